"""Whole jobs on a Ray that dies: the service's own, and a cluster whose head comes back."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.checkpoints import make_family
from tests.support.jobs_over_http import finish, shard_states, wait_for
from tests.support.merges import recipe, weight_bytes
from tests.support.service_process import ServiceProcess, running_service

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

OPTIONS = {"max_shard_size": "400KB", "memory_budget": "64MiB"}
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray-jobs")


@pytest.fixture(scope="module")
def document(home: Path) -> dict[str, Any]:
    family = make_family(home / "models", num_experts=2, hidden=128, layers=4)
    return recipe(family, "wudi", steps=1500)


@pytest.fixture(scope="module")
def undisturbed(home: Path, document: dict[str, Any]) -> dict[str, bytes]:
    storage = open_storage()
    output = str(home / "undisturbed")
    run_plan(make_plan(parse_recipe(document), storage, MergeOptions(**OPTIONS), output), storage)
    return weight_bytes(home / "undisturbed")


def begin(service: ServiceProcess, document: dict[str, Any], output: Path) -> str:
    """A job of which a shard is published and others are not."""
    with service.client() as client:
        job_id = str(client.submit(document, str(output), options=OPTIONS)["id"])
        wait_for(lambda: "succeeded" in shard_states(client, job_id), "the first shard")
        assert not client.job(job_id)["is_terminal"]
    return job_id


def end(service: ServiceProcess, job_id: str) -> list[dict[str, Any]]:
    """Follow the job to its success; its events."""
    with service.client() as client:
        job, events = finish(client, job_id)
    assert job["state"] == "succeeded", job["error"]
    return events


def test_the_loss_of_its_own_ray_in_mid_job_costs_the_shards_in_flight(
    home: Path, document: dict[str, Any], undisturbed: dict[str, bytes]
) -> None:
    with running_service(home / "own", [str(home)], {"MERGEYARD_RAY_NUM_CPUS": "1"}) as service:
        job_id = begin(service, document, home / "own-lost")
        (head,) = [p for p in service.descendants() if p.name().startswith("gcs_server")]
        head.kill()
        events = end(service, job_id)
    assert weight_bytes(home / "own-lost") == undisturbed
    assert codes_of_retries(events) <= {"worker_lost"}


def codes_of_retries(events: list[dict[str, Any]]) -> set[str]:
    """Why shards were tried again."""
    return {e["data"]["error"]["code"] for e in events if e["type"] == "shard.retried"}


class RayHead:
    """A cluster of one machine, started as operators do it; it can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.token = folder / "token"
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    @property
    def environment(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}

    def start(self) -> None:
        command = [Path(sys.executable).with_name("ray"), "start", "--head", "--num-cpus=1"]
        command += [f"--port={self.port}", "--node-ip-address=127.0.0.1", "--num-gpus=0"]
        command += ["--include-dashboard=false", f"--temp-dir={self._folder}/ray"]
        command += [f"--object-store-memory={128 << 20}", "--disable-usage-stats"]
        environment = {**os.environ, **self.environment, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(
            command, env=environment, cwd="/", capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def kill(self) -> None:
        mark = f"{self._folder}/ray"
        family = [p for p in psutil.process_iter() if mark in " ".join(_command_line(p))]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=30)


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def ray_head() -> Iterator[RayHead]:
    with tempfile.TemporaryDirectory(prefix="ray-head-") as folder:
        head = RayHead(Path(folder))
        try:
            head.start()
            yield head
        finally:
            head.kill()


def test_a_cluster_whose_head_restarts_in_mid_job_is_joined_anew(
    home: Path, document: dict[str, Any], undisturbed: dict[str, bytes]
) -> None:
    with ray_head() as head:
        environment = {**head.environment, "MERGEYARD_RAY_ADDRESS": f"127.0.0.1:{head.port}"}
        with running_service(home / "cluster", [str(home)], environment) as service:
            job_id = begin(service, document, home / "head-lost")
            head.kill()
            head.start()
            events = end(service, job_id)
    assert weight_bytes(home / "head-lost") == undisturbed
    assert codes_of_retries(events) == {"worker_lost"}
