"""Whole jobs from S3 to S3, on a real server behind a proxy that does what networks do."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from examples.s3_server import S3Server, s3_server
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage import s3_connection
from merging.storage.router import open_storage
from service.runner.collector import Collector
from tests.support.checkpoints import make_family
from tests.support.fault_proxy import Fault, FaultProxy, fault_proxy
from tests.support.jobs_over_http import finish, wait_for
from tests.support.live_service import LiveService, live_service
from tests.support.merges import recipe, weight_bytes
from tests.support.s3_models import download_prefix, upload_folder

pytestmark = [pytest.mark.s3, pytest.mark.slow]

OPTIONS = {"max_shard_size": "10MB", "memory_budget": "64MiB"}


@dataclass(frozen=True)
class Bench:
    """A service whose S3 is the proxy, and what its merge should give."""

    server: S3Server
    proxy: FaultProxy
    service: LiveService
    bucket: str
    document: dict[str, Any]
    undisturbed: dict[str, bytes]

    def merge(self, tmp_path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A job from submission to its end: it and its events."""
        output = f"s3://{self.bucket}/{secrets.token_hex(4)}"
        with self.service.client() as client:
            job_id = client.submit(self.document, output, options=OPTIONS)["id"]
            job, events = finish(client, job_id)
        self.proxy.set(every=0)
        if job["state"] == "succeeded":
            fetched = download_prefix(self.server, output, tmp_path / "fetched")
            assert weight_bytes(fetched) == self.undisturbed
            assert not (fetched / ".mergeyard").exists()
        return job, events

    def open_uploads(self) -> list[str]:
        answer = self.server.client().list_multipart_uploads(Bucket=self.bucket)
        return [upload["Key"] for upload in answer.get("Uploads", ())]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("s3-jobs")
    family = make_family(folder / "models", num_experts=2, hidden=512, layers=3)
    storage = open_storage()
    document = recipe(family, "task_arithmetic", weight=0.4)
    options = MergeOptions(**OPTIONS)
    plan = make_plan(parse_recipe(document), storage, options, str(folder / "undisturbed"))
    assert len(plan.shards) > 2
    assert max(shard.size for shard in plan.shards) > 8 << 20, "some are uploaded in parts"
    run_plan(plan, storage)
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_ENDPOINT_URL"):
            patch.delenv(name, raising=False)
        server.create_bucket("merges")
        remote = {
            "merge_method": "task_arithmetic",
            "base_model": upload_folder(server, family.base, "merges", "base"),
            "models": [
                {"model": upload_folder(server, expert, "merges", f"experts/{number}")}
                for number, expert in enumerate(family.experts)
            ],
            "parameters": {"weight": 0.4},
        }
        with fault_proxy(server.endpoint) as proxy:
            environment = {**server.environment(), "AWS_ENDPOINT_URL_S3": proxy.endpoint}
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(s3_connection, "_READ_SECONDS", 2)  # so that stalls are short
            settings = {"retry_seconds": 0.1, "lease_seconds": 5.0}
            with live_service(folder / "data", "s3://merges", **settings) as service:
                bytes_of = weight_bytes(folder / "undisturbed")
                yield Bench(server, proxy, service, "merges", remote, bytes_of)


@pytest.mark.parametrize(
    "faults",
    [
        (Fault.SLOW_DOWN, Fault.TOO_MANY, Fault.INTERNAL),
        (Fault.RESET,),
        (Fault.LOSE_ANSWER,),
        (Fault.TRUNCATE,),
        (Fault.STALL,),
    ],
    ids=lambda faults: faults[0].name.lower(),
)
def test_a_merge_outlasts_what_storage_does(
    bench: Bench, tmp_path: Path, faults: tuple[Fault, ...]
) -> None:
    bench.proxy.met.clear()
    bench.proxy.set(*faults, every=12 if Fault.STALL in faults else 4)
    job, _ = bench.merge(tmp_path)
    assert job["state"] == "succeeded", job["error"]
    assert set(bench.proxy.met) == set(faults)
    # Uploads of whose beginning nobody heard go with what jobs leave behind.
    Collector(bench.service.store, open_storage, kept_seconds=0).collect_all()
    assert bench.open_uploads() == []


def test_a_server_that_is_killed_in_mid_job_and_comes_back_costs_nothing(
    bench: Bench, tmp_path: Path
) -> None:
    output = f"s3://{bench.bucket}/killed"
    with bench.service.client() as client:
        job_id = client.submit(bench.document, output, options=OPTIONS)["id"]
        wait_for(lambda: client.job(job_id)["progress"]["bytes_done"] > 0, "some bytes")
        bench.server.kill()
        assert not client.job(job_id)["is_terminal"]
        bench.server.start()
        job, _ = finish(client, job_id)
    assert job["state"] == "succeeded", job["error"]
    fetched = download_prefix(bench.server, output, tmp_path / "fetched")
    assert weight_bytes(fetched) == bench.undisturbed
