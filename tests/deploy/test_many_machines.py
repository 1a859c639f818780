"""A cluster of machines: Ray's head and three workers with networks and processes of their own.

With an S3 server, PostgreSQL, two API replicas and two runners; what a machine that is cut off in
mid-job costs, and what comes out.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from examples.s3_server import S3Server
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from service.client import Client
from tests.support.checkpoints import Family, make_family
from tests.support.cluster import Cluster, running_cluster
from tests.support.fault_proxy import fault_proxy
from tests.support.jobs_over_http import finish, shards, wait_for
from tests.support.merges import recipe, weight_bytes
from tests.support.network import Host, Machine, Network, network
from tests.support.pools import REPOSITORY
from tests.support.s3_models import download_prefix, upload_folder

pytestmark = [
    pytest.mark.ray,
    pytest.mark.s3,
    pytest.mark.postgres,
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

OPTIONS = {"max_shard_size": "2MB", "memory_budget": "64MiB"}
METHODS: dict[str, dict[str, Any]] = {"wudi": {"steps": 150}, "ties": {"density": 0.5}}
WORKERS = ("red", "green", "blue")

# How soon Ray gives a silent machine up: seconds, where its default is some half a minute.
_HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass(frozen=True)
class Machines:
    """All that runs.

    Attributes:
        cluster: API replicas and runners.
        network: Between the machines.
        workers: Where each of Ray's workers is, by its name.
    """

    cluster: Cluster
    network: Network
    workers: dict[str, Host]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("models")
    return make_family(folder, num_experts=3, hidden=256, layers=3, shards=2)


@pytest.fixture(scope="module")
def undisturbed(
    family: Family, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, bytes]]:
    """What each method gives in one process, from folders."""
    storage = open_storage()
    results = {}
    for method, parameters in METHODS.items():
        output = tmp_path_factory.mktemp("undisturbed") / method
        document = parse_recipe(recipe(family, method, **parameters))
        run_plan(make_plan(document, storage, MergeOptions(**OPTIONS), str(output)), storage)
        results[method] = weight_bytes(output)
    return results


@pytest.fixture
def machines(s3_env: S3Server, bucket: str, tmp_path: Path) -> Iterator[Machines]:
    """Everything, started."""
    with ExitStack() as stack:
        net = stack.enter_context(network())
        # Reached by all machines, unlike the server itself, which listens on loopback.
        front = stack.enter_context(fault_proxy(s3_env.endpoint, net.address))
        environment = {
            **_HEALTH,
            "AWS_ENDPOINT_URL_S3": front.endpoint,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",  # what others on this machine need is theirs
            "PYTHONPATH": str(REPOSITORY),
        }

        def switch_on(name: str, host: Host | None, *words: str) -> Machine:
            machine = Machine(name, tmp_path / name, host)
            stack.callback(machine.switch_off)
            ray = Path(sys.executable).with_name("ray")
            address = host.address if host else net.address
            command = [
                str(ray), "start", "--block", "--num-gpus=0", "--object-store-memory=80000000",
                "--dashboard-agent-listen-port=0", f"--node-ip-address={address}", *words,
            ]  # fmt: skip
            log = tmp_path / f"{name}.log"
            machine.run(command, {**os.environ, **environment}, log)
            wait_for(lambda: "Ray runtime started" in log.read_text(), f"{name} to start")
            return machine

        head, *others = (net.add_host() for _ in range(1 + len(WORKERS)))
        workers = dict(zip(WORKERS, others, strict=True))
        switch_on(
            "head", head, "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false"
        )
        join = f"--address={head.address}:6379"
        for name, host in workers.items():
            switch_on(name, host, join, "--num-cpus=1")
        door = switch_on("door", None, join, "--num-cpus=0")
        cluster = stack.enter_context(
            running_cluster(
                tmp_path,
                [f"s3://{bucket}"],
                num_apis=2,
                num_runners=2,
                environment={
                    **environment,
                    "MERGEYARD_POOL": "ray",
                    "MERGEYARD_LEASE_SECONDS": "20",
                    "MERGEYARD_RAY_ADDRESS": f"{head.address}:6379",
                },
                runner_prefix=door.prefix,
            )
        )
        yield Machines(cluster, net, workers)


def submit(machines: Machines, family: Family, root: str, method: str) -> str:
    document = recipe(family, method, **METHODS[method])
    document["models"] = [
        {"model": f"{root}/expert-{number}"} for number in range(len(family.experts))
    ]
    document["base_model"] = f"{root}/base"
    return machines.cluster.submit(document, f"{root}/{method}", options=OPTIONS)


def busy(client: Client, job_id: str) -> list[str]:
    """Machines that are at work on a job which has some shards done."""
    found = shards(client, job_id)
    if all(shard["state"] != "succeeded" for shard in found):
        return []
    running = [shard for shard in found if shard["state"] == "running" and shard["worker"]]
    return [shard["worker"].partition(":")[0] for shard in running]


def test_a_machine_cut_off_in_mid_job_costs_its_shard_and_no_byte(
    machines: Machines,
    family: Family,
    undisturbed: dict[str, dict[str, bytes]],
    s3_env: S3Server,
    bucket: str,
    tmp_path: Path,
) -> None:
    root = f"s3://{bucket}"
    for folder in (family.base, *family.experts):
        upload_folder(s3_env, folder, bucket, folder.name)
    jobs = {method: submit(machines, family, root, method) for method in METHODS}
    with machines.cluster.client() as client:
        victim, *_ = wait_for(lambda: busy(client, jobs["wudi"]), "a machine at work")
        machines.network.cut_off(machines.workers[victim])
        before = shards(client, jobs["wudi"])
        ends = {method: finish(client, job_id) for method, job_id in jobs.items()}
        after = shards(client, jobs["wudi"])
    for method, (job, _) in ends.items():
        assert job["state"] == "succeeded", job["error"]
        merged = download_prefix(s3_env, f"{root}/{method}", tmp_path / "merged" / method)
        assert weight_bytes(merged) == undisturbed[method]
    done_again = {
        then["index"]
        for then, now in zip(before, after, strict=True)
        if 0 < then["attempt"] < now["attempt"]
    }
    assert done_again  # the shard that the machine had
    assert not done_again & {then["index"] for then in before if then["state"] == "succeeded"}
