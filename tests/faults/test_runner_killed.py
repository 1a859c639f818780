"""A runner that is killed without warning, for real."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from merging.recipe import parse_recipe
from service.jobs.records import NewJob
from service.jobs.sql_store import open_store
from service.jobs.states import JobState, ShardState
from tests.support.checkpoints import make_family
from tests.support.merges import recipe
from tests.support.pools import REPOSITORY

PATIENCE_SECONDS = 90.0


@contextmanager
def runner_process(url: str) -> Iterator[None]:
    """A runner that is killed with SIGKILL at the end of the block."""
    command = [sys.executable, "-m", "tests.support.runner_process", url]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "still waiting"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_job_survives_the_death_of_two_runners(tmp_path: Path) -> None:
    family = make_family(tmp_path / "models", num_experts=2, layers=6, hidden=128)
    url = f"sqlite:///{tmp_path}/jobs.db"
    store = open_store(url)
    document = recipe(family, "wudi", steps=3000)  # so long that runners die in mid-job
    job, _ = store.submit(
        NewJob(
            recipe_source=document,
            recipe=document,
            recipe_digest=parse_recipe(document).digest,
            method="wudi",
            methods=("wudi",),
            output_uri=str(tmp_path / "merged"),
            options={"max_shard_size": 300_000},
        )
    )

    def done() -> int:
        return [shard.state for shard in store.shards(job.id)].count(ShardState.SUCCEEDED)

    for _ in range(2):
        before = done()
        with runner_process(url):
            wait_until(lambda before=before: done() > before or store.get(job.id).is_terminal)
        assert store.get(job.id).state == JobState.RUNNING
    with runner_process(url):
        wait_until(lambda: store.get(job.id).is_terminal)
    end = store.get(job.id)
    assert (end.state, end.error) == (JobState.SUCCEEDED, None)
    assert end.fencing_token == 3
    kinds = [str(event.type) for event in store.events(job.id, limit=10_000)]
    assert kinds.count("job.finished") == 1
    assert len(kinds) == store.get(job.id).event_seq
    redone = kinds.count("shard.started") - end.progress.shards_total
    assert redone <= 2  # at most what was in flight at each death
    leftovers = [path for path in (tmp_path / "merged").rglob("*") if ".mergeyard" in str(path)]
    assert leftovers == []
    store.close()
