"""The service under the loss of what it runs on: same bytes, one ending, nothing lost.

Real processes on loopback: the service, its Ray, its workers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.checkpoints import Family, make_family
from tests.support.merges import recipe, weight_bytes
from tests.support.service_process import ServiceProcess, running_service

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

OPTIONS = {"max_shard_size": "2MB", "memory_budget": "64MiB"}
STEPS = 900
"""So many that there is time to interfere with a job, on a fast machine too."""

_PATIENCE_SECONDS = 240


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def family(home: Path) -> Family:
    return make_family(home / "models", num_experts=3, hidden=256, layers=4, shards=2)


@pytest.fixture(scope="module")
def undisturbed(home: Path, family: Family) -> dict[str, bytes]:
    """What the merge gives in one process, without service or Ray."""
    storage = open_storage()
    document = parse_recipe(recipe(family, "wudi", steps=STEPS))
    output = str(home / "undisturbed")
    run_plan(make_plan(document, storage, MergeOptions(**OPTIONS), output), storage)
    return weight_bytes(home / "undisturbed")


@pytest.fixture(scope="module")
def service(home: Path) -> Iterator[ServiceProcess]:
    environment = {"MERGEYARD_RAY_NUM_CPUS": "2", "MERGEYARD_LEASE_SECONDS": "3"}
    with running_service(home / "data", [str(home)], environment) as running:
        yield running


def wait_for(condition, what: str):
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {_PATIENCE_SECONDS} s for {what}")


def finish(service: ServiceProcess, job_id: str) -> tuple[dict, list[dict]]:
    """Follow a job to its end; its object and all its events, which have no gaps."""
    with service.client() as client:
        events = list(client.events(job_id))
        job = client.job(job_id)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["type"] for event in events].count("job.finished") == 1
    return job, events


def shards(service: ServiceProcess, job_id: str) -> list[dict]:
    with service.client() as client:
        return client._call("GET", f"/v1/jobs/{job_id}/shards")["data"]


def shard_states(service: ServiceProcess, job_id: str) -> list[str]:
    return [shard["state"] for shard in shards(service, job_id)]


def running_workers(service: ServiceProcess, job_id: str) -> list[int]:
    """Process ids of the workers that are solving a shard of the job."""
    running = [shard for shard in shards(service, job_id) if shard["state"] == "running"]
    return [int(shard["worker"].rpartition(":")[2]) for shard in running if shard["worker"]]


def submit(service: ServiceProcess, family: Family, output: Path) -> str:
    with service.client() as client:
        return client.submit(recipe(family, "wudi", steps=STEPS), str(output), options=OPTIONS)[
            "id"
        ]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_number_of_workers_does_not_change_the_bytes(
    home, family, undisturbed, workers, tmp_path
):
    output = home / f"workers-{workers}"
    environment = {"MERGEYARD_RAY_NUM_CPUS": workers}
    with running_service(tmp_path / "data", [str(home)], environment) as service:
        job, _ = finish(service, submit(service, family, output))
    assert job["state"] == "succeeded", job["error"]
    assert len(undisturbed) > 4
    assert weight_bytes(output) == undisturbed


def test_a_killed_worker_costs_only_its_shard(service, home, family, undisturbed):
    output = home / "worker-killed"
    job_id = submit(service, family, output)
    wait_for(lambda: "succeeded" in shard_states(service, job_id), "the first shard")
    (victim, *_) = wait_for(lambda: running_workers(service, job_id), "a worker at work")
    done_before = shard_states(service, job_id).count("succeeded")
    psutil.Process(victim).kill()
    job, events = finish(service, job_id)
    assert job["state"] == "succeeded", job["error"]
    assert weight_bytes(output) == undisturbed
    retried = [event for event in events if event["type"] == "shard.retried"]
    assert 1 <= len(retried) <= 2, [e["data"] for e in retried]
    starts = [event for event in events if event["type"] == "shard.started"]
    assert len(starts) <= len(undisturbed) + len(retried)
    assert done_before >= 1


def test_a_killed_service_goes_on_from_its_receipts(service, home, family, undisturbed):
    output = home / "service-killed"
    job_id = submit(service, family, output)
    wait_for(lambda: shard_states(service, job_id).count("succeeded") >= 2, "two shards")
    finished = {path.name: path.stat().st_mtime_ns for path in output.glob("*.safetensors")}
    assert len(finished) < len(undisturbed)
    assert not (output / "model.safetensors.index.json").exists()
    service.kill()
    service.start()
    job, _ = finish(service, job_id)
    assert job["state"] == "succeeded", job["error"]
    assert weight_bytes(output) == undisturbed
    untouched = [n for n, mtime in finished.items() if (output / n).stat().st_mtime_ns == mtime]
    assert len(untouched) >= 2, "published shards are not done again"


def test_a_source_overwritten_during_the_merge_fails_the_job(service, home, tmp_path):
    family = make_family(home / "changing", num_experts=3, hidden=256, layers=4, shards=2)
    job_id = submit(service, family, home / "changed")
    wait_for(lambda: "succeeded" in shard_states(service, job_id), "the first shard")
    for file in family.experts[1].glob("*.safetensors"):
        save_file(load_file(file), file, metadata={"format": "pt"})
    job, _ = finish(service, job_id)
    assert job["state"] == "failed"
    assert job["error"]["code"] == "source_changed"
    assert "expert-1" in job["error"]["detail"]
    assert not (home / "changed" / "model.safetensors.index.json").exists()


def test_cancelling_in_mid_run_publishes_nothing(service, home, family):
    output = home / "cancelled"
    job_id = submit(service, family, output)
    wait_for(lambda: "running" in shard_states(service, job_id), "a shard at work")
    with service.client() as client:
        assert client.cancel(job_id)["state"] == "cancelling"
    job, _ = finish(service, job_id)
    assert job["state"] == "cancelled"
    assert not (output / "model.safetensors.index.json").exists()
    assert not list(output.glob(".mergeyard-*.tmp"))


def test_sigterm_ends_the_service_and_all_that_it_started(home, family, tmp_path):
    with running_service(tmp_path / "data", [str(home)]) as service:
        job_id = submit(service, family, home / "interrupted")
        wait_for(lambda: "running" in shard_states(service, job_id), "a shard at work")
        family_of_processes = service.descendants()
        assert family_of_processes
        service._process.terminate()
        assert service._process.wait(60) == 0
        _, alive = psutil.wait_procs(family_of_processes, timeout=30)
        assert alive == []
        log = service.log
    token = (tmp_path / "data" / "admin-token").read_text().strip()
    assert "Traceback" not in log
    assert token not in log
    assert log.count("/auth?code=") == 1, "the link is shown once"
    for line in log.splitlines():
        if line.startswith("{"):
            json.loads(line)
