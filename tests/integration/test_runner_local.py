"""The runner as it runs: its own threads, the engine in a local pool, files on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from service.jobs.records import JobRecord, NewJob
from service.jobs.sql_store import SqlJobStore, open_store
from service.jobs.states import JobState
from service.runner.loop import Runner
from service.runner.settings import RunnerSettings
from tests.support.checkpoints import Family, make_family
from tests.support.fake_pool import FakePool
from tests.support.merges import recipe, weight_bytes
from workers.local_pool import LocalPool

PATIENCE_SECONDS = 60.0
OPTIONS = {"max_shard_size": 60_000}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "still waiting"
        time.sleep(0.02)


def document_of(family: Family, method: str) -> dict[str, Any]:
    document = recipe(family, method)
    if method in ("lot", "regmean_plus_plus"):
        document["calibration"] = {"data": [[1, 2, 3, 4, 5], [6, 7]], "batch": 1}
    return document


def submit(store: SqlJobStore, family: Family, output: Path, method: str = "ties") -> JobRecord:
    document = document_of(family, method)
    job = NewJob(
        recipe_source=document,
        recipe=document,
        recipe_digest=parse_recipe(document).digest,
        method=method,
        methods=(method,),
        output_uri=str(output),
        options=OPTIONS,
    )
    return store.submit(job)[0]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlJobStore]:
    made = open_store(f"sqlite:///{tmp_path}/jobs.db")
    yield made
    made.close()


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(tmp_path / "models", num_experts=2)


@pytest.mark.parametrize(
    ("method", "workers"),
    [("ties", 2), ("iso_wudi", 1), ("iso_wudi", 4), ("lot", 2), ("regmean_plus_plus", 2)],
)
def test_a_job_gives_the_bytes_that_the_engine_gives_by_itself(
    store: SqlJobStore, family: Family, tmp_path: Path, method: str, workers: int
) -> None:
    """In one pass, in stages, with experts run on samples, with output files read again."""
    document = parse_recipe(document_of(family, method))
    options = MergeOptions(**OPTIONS)
    plan = make_plan(document, open_storage(), options, str(tmp_path / "direct"))
    run_plan(plan, open_storage())
    roots = (str(tmp_path),)
    pool = LocalPool(workers)
    runner = Runner(
        store,
        lambda: open_storage(roots),
        pool,
        RunnerSettings(storage_roots=roots, device="cpu", claim_seconds=0.05),
    )
    runner.start()
    job = submit(store, family, tmp_path / "by-job", method)
    wait_until(lambda: store.get(job.id).is_terminal)
    done = store.get(job.id)
    assert (done.state, done.error) == (JobState.SUCCEEDED, None)
    assert done.progress.shards_done == len(plan.shards) > 3
    assert weight_bytes(tmp_path / "by-job") == weight_bytes(tmp_path / "direct")
    assert runner.is_running
    runner.stop()
    assert not runner.is_running
    pool.close()


def test_a_job_outside_the_storage_roots_fails_and_reads_nothing(
    store: SqlJobStore, family: Family, tmp_path: Path
) -> None:
    roots = (str(tmp_path / "models"),)
    pool = LocalPool(1)
    runner = Runner(
        store,
        lambda: open_storage(roots),
        pool,
        RunnerSettings(storage_roots=roots, device="cpu", claim_seconds=0.05),
    )
    runner.start()
    job = submit(store, family, tmp_path / "elsewhere")
    wait_until(lambda: store.get(job.id).is_terminal)
    error = store.get(job.id).error
    assert error
    assert error["code"] == "uri_not_allowed"
    assert not (tmp_path / "elsewhere").exists()
    runner.stop()
    pool.close()


def test_a_drain_that_takes_too_long_can_be_cut_short(
    store: SqlJobStore, family: Family, tmp_path: Path
) -> None:
    pool = FakePool(open_storage())
    pool.holding = True
    runner = Runner(store, open_storage, pool, RunnerSettings(claim_seconds=0.05))
    runner.start()
    job = submit(store, family, tmp_path / "merged")
    wait_until(lambda: store.get(job.id).phase == "merging")
    runner.stop(drain=True, timeout_seconds=0.5)
    assert runner.is_running
    assert store.get(job.id).lease_owner is not None
    runner.stop(drain=False)
    assert not runner.is_running
    given_back = store.get(job.id)
    assert (given_back.state, given_back.lease_owner) == (JobState.RUNNING, None)
    assert pool.in_flight == []


@pytest.mark.parametrize(
    ("method", "parameter", "all_differ"),
    [("task_arithmetic", "lambda", True), ("opcm", "alpha", False)],
)
def test_a_sweep_is_one_job_with_a_checkpoint_for_each_variant(
    store: SqlJobStore,
    family: Family,
    tmp_path: Path,
    method: str,
    parameter: str,
    all_differ: bool,
) -> None:
    """In one pass, and in several with files of each variant between them."""
    document = {
        **recipe(family, method),
        "sweep": [
            {"name": "low", "parameters": {parameter: 0.3}},
            {"name": "high", "parameters": {parameter: 0.7}},
        ],
    }
    output = tmp_path / "swept"
    parsed = parse_recipe(document)
    job, _ = store.submit(
        NewJob(
            recipe_source=document,
            recipe=parsed.normalised(),
            recipe_digest=parsed.digest,
            method=parsed.merge_method,
            methods=parsed.methods,
            output_uri=str(output),
            options=OPTIONS,
        )
    )
    runner = Runner(
        store,
        open_storage,
        LocalPool(2),
        RunnerSettings(device="cpu", claim_seconds=0.05),
    )
    runner.start()
    wait_until(lambda: store.get(job.id).is_terminal)
    done = store.get(job.id)
    assert (done.state, done.error) == (JobState.SUCCEEDED, None)
    assert done.output is not None
    report = store.load_report(job.id)
    assert report is not None
    assert [v["name"] for v in done.output["variants"]] == ["low", "high"]
    for variant, own in zip(done.output["variants"], report["variants"], strict=True):
        folder = output / variant["name"]
        assert variant["uri"] == own["output"]["uri"] == str(folder)
        assert variant["digest"] == own["output"]["digest"]
        assert own["tensors"]
        assert [f["name"] for f in variant["files"]] == sorted(weight_bytes(folder))
    shards = store.shards(job.id)
    assert done.progress.bytes_done == done.progress.bytes_total
    assert done.progress.bytes_total == sum(s.bytes_read_total + s.bytes_total for s in shards)
    num_files = []
    for shard in shards:
        assert shard.receipt is not None
        num_files.append(1 + len(shard.receipt["others"]))
        assert not any("problems" in other for other in shard.receipt["others"])
        assert shard.bytes_total == num_files[-1] * shard.receipt["size"]
    assert set(num_files) == ({2} if all_differ else {1, 2})
    committed = [e for e in store.events(job.id) if e.type == "job.output_committed"]
    assert committed[0].data["output"] == done.output
    runner.stop()
