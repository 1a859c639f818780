"""Three API replicas and three runners on one PostgreSQL, and what happens to them.

Real processes on loopback. The tests go from all of them to fewer: what one kills, the next starts.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.publish import INDEX_NAME
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from service.client import ApiError
from tests.support.checkpoints import make_family
from tests.support.cluster import LEASE_SECONDS, Cluster, running_cluster
from tests.support.jobs_over_http import finish, shard_states, wait_for
from tests.support.merges import recipe, weight_bytes

pytestmark = [pytest.mark.postgres, pytest.mark.slow, pytest.mark.timeout(600)]

OPTIONS = {"max_shard_size": "400KB", "memory_budget": "64MiB"}
STEPS = 400


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def document(home: Path) -> dict[str, Any]:
    family = make_family(home / "models", num_experts=2, hidden=128, layers=4)
    return recipe(family, "wudi", steps=STEPS)


@pytest.fixture(scope="module")
def undisturbed(home: Path, document: dict[str, Any]) -> dict[str, bytes]:
    storage = open_storage()
    output = str(home / "undisturbed")
    run_plan(make_plan(parse_recipe(document), storage, MergeOptions(**OPTIONS), output), storage)
    return weight_bytes(home / "undisturbed")


@pytest.fixture(scope="module")
def shared(home: Path) -> Iterator[Cluster]:
    try:
        with running_cluster(home, [str(home)], num_apis=3, num_runners=3) as cluster:
            yield cluster
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def cluster(shared: Cluster) -> Cluster:
    """All of it is running."""
    shared.start()
    return shared


def assert_succeeded(
    cluster: Cluster, job_id: str, output: Path, expected: dict[str, bytes]
) -> dict[str, Any]:
    with cluster.client() as client:
        job, _ = finish(client, job_id)
    assert job["state"] == "succeeded", job["error"]
    assert weight_bytes(output) == expected
    assert not (output / ".mergeyard").exists()
    return job


def states(cluster: Cluster, job_id: str) -> list[str]:
    with cluster.client() as client:
        return shard_states(client, job_id)


def test_one_of_each_dies_and_every_job_ends_once(
    cluster: Cluster, home: Path, document: dict[str, Any], undisturbed: dict[str, bytes]
) -> None:
    outputs = [home / f"many-{number}" for number in range(9)]
    jobs = [cluster.submit(document, output, options=OPTIONS) for output in outputs]
    wait_for(lambda: "succeeded" in states(cluster, jobs[0]), "the first shard")
    cluster.runners[0].kill()
    cluster.apis[0].kill()
    for job_id, output in zip(jobs, outputs, strict=True):
        assert_succeeded(cluster, job_id, output, undisturbed)


def test_fifty_equal_requests_to_three_replicas_make_one_job(
    cluster: Cluster, home: Path, document: dict[str, Any], undisturbed: dict[str, bytes]
) -> None:
    output = home / "once"
    clients = [cluster.client(api) for api in cluster.apis]

    def submit(number: int) -> str:
        client = clients[number % len(clients)]
        job = client.submit(document, str(output), idempotency_key="once", options=OPTIONS)
        return str(job["id"])

    with ThreadPoolExecutor(16) as threads:
        (job_id,) = set(threads.map(submit, range(50)))
    for client in clients:
        client.close()
    assert_succeeded(cluster, job_id, output, undisturbed)


def test_a_database_that_is_killed_in_mid_job_and_comes_back_costs_nothing(
    cluster: Cluster, home: Path, document: dict[str, Any], undisturbed: dict[str, bytes]
) -> None:
    outputs = [home / f"database-{number}" for number in range(3)]
    jobs = [cluster.submit(document, output, options=OPTIONS) for output in outputs]
    wait_for(lambda: "succeeded" in states(cluster, jobs[0]), "the first shard")
    cluster.postgres.kill()
    time.sleep(1)  # so that all of them notice
    cluster.postgres.start()
    for job_id, output in zip(jobs, outputs, strict=True):
        assert_succeeded(cluster, job_id, output, undisturbed)


def test_a_runner_that_wakes_up_after_others_took_its_jobs_changes_nothing(
    cluster: Cluster, home: Path, document: dict[str, Any], undisturbed: dict[str, bytes]
) -> None:
    output = home / "asleep"
    job_id = cluster.submit(document, output, options=OPTIONS)
    wait_for(lambda: "succeeded" in states(cluster, job_id), "the first shard")
    with cluster.client() as client:
        (sleeper,) = [
            runner
            for runner in cluster.runners
            if f'"job_id": "{job_id}"' in runner.log and "job_claimed" in runner.log
        ]
        sleeper.process.send_signal(signal.SIGSTOP)
        try:
            warned = wait_for(
                lambda: [
                    event
                    for event in client._call("GET", f"/v1/jobs/{job_id}/events?limit=1000")["data"]
                    if event["data"].get("code") == "runner_lost"
                ],
                f"another runner to take over after {LEASE_SECONDS} s",
            )
        finally:
            sleeper.process.send_signal(signal.SIGCONT)
        job, _ = finish(client, job_id)
        wait_for(lambda: "lease_lost" in sleeper.log, "the sleeper to notice")
        assert client.job(job_id)["etag"] == job["etag"]
    assert len(warned) == 1
    assert job["state"] == "succeeded", job["error"]
    assert weight_bytes(output) == undisturbed
    assert len(list(output.glob(".mergeyard*"))) == 0


def test_a_cancel_at_any_moment_ends_a_job_once_and_leaves_a_whole_result_or_none(
    cluster: Cluster, home: Path, document: dict[str, Any], undisturbed: dict[str, bytes]
) -> None:
    chance = random.Random(4)
    quick = {**document, "parameters": {"steps": 5}}
    ends = []
    for number in range(12):
        output = home / f"cancelled-{number}"
        job_id = cluster.submit(quick, output, options=OPTIONS)
        time.sleep(chance.uniform(0, 2.0))
        with cluster.client() as client:
            with suppress(ApiError):  # too late
                client.cancel(job_id, mode=chance.choice(["orderly", "now"]))
            job, _ = finish(client, job_id)
        ends.append(job["state"])
        assert (output / INDEX_NAME).exists() == (job["state"] == "succeeded")
    assert set(ends) == {"cancelled", "succeeded"}
