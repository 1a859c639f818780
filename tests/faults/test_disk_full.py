"""A disk that is full in mid-job: a small one of its own, in memory."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from merging.local_run import run_plan
from merging.publish import INDEX_NAME
from merging.storage.router import open_storage
from tests.support.checkpoints import make_family
from tests.support.jobs_over_http import all_events, wait_for
from tests.support.live_service import live_service
from tests.support.merges import plan_merge, recipe, weight_bytes

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_fails_the_job_and_a_retry_goes_on_from_there(
    disk: Path, tmp_path: Path
) -> None:
    family = make_family(tmp_path / "models", num_experts=2, hidden=128, layers=4)
    options = {"max_shard_size": "400KB"}
    storage = open_storage()
    undisturbed = tmp_path / "undisturbed"
    run_plan(plan_merge(family, "linear", storage, undisturbed, max_shard_size=400_000), storage)
    assert sum(map(len, weight_bytes(undisturbed).values())) > 1 << 20
    output = disk / "merged"
    with live_service(tmp_path / "data", tmp_path) as service, service.client() as client:
        job = client.submit(recipe(family, "linear"), str(output), options=options)
        failed = client.wait(job["id"])
        assert (failed["state"], failed["error"]["code"]) == ("failed", "no_space")
        assert "no space is left" in failed["error"]["detail"]
        assert not (output / INDEX_NAME).exists()
        assert not list(output.glob(".mergeyard-*.tmp"))
        published = {path.name: path.stat().st_mtime_ns for path in output.glob("*.safetensors")}
        assert published

        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        client._call("POST", f"/v1/jobs/{job['id']}/retry")
        wait_for(lambda: client.job(job["id"])["is_terminal"], "the end")
        done = client.job(job["id"])
        assert (done["state"], done["attempt"]) == ("succeeded", 2), done["error"]
        endings = [
            e["attempt"] for e in all_events(client, job["id"]) if e["type"] == "job.finished"
        ]
    assert endings == [1, 2]
    assert weight_bytes(output) == weight_bytes(undisturbed)
    for name, time in published.items():
        assert (output / name).stat().st_mtime_ns == time, "published shards are not done again"
