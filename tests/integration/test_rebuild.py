"""Tasks' own models rebuilt from S3 to S3, also of what a job of the service left there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from examples.s3_server import S3Server
from merging.errors import Cancelled, StorageError
from merging.execute.shard import run_shard
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.plan import Plan, ShardWork
from merging.plan.planner import make_plan
from merging.publish import INDEX_NAME
from merging.rebuild import plan_rebuild
from merging.receipts import Receipt
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from merging.verify import verify_published
from tests.support.checkpoints import Family, make_family
from tests.support.cli import mergeyard
from tests.support.jobs_over_http import finish
from tests.support.merges import recipe, weight_bytes
from tests.support.s3_models import download_prefix, upload_folder
from tests.support.service_process import running_service

pytestmark = pytest.mark.s3

SIZES = {"max_shard_size": "3MB", "memory_budget": "16MiB"}


@dataclass(frozen=True)
class Bench:
    """The same models in folders and in a bucket, and a task's model made of the former.

    Attributes:
        s3: The server.
        bucket: In it.
        document: A recipe with the bucket's addresses.
        expected: Weight files of the second task's model.
    """

    s3: S3Server
    bucket: str
    document: dict[str, Any]
    expected: dict[str, bytes]

    def at(self, name: str) -> str:
        return f"s3://{self.bucket}/{name}"

    def names(self, output: str) -> list[str]:
        return [item.uri[len(output) + 1 :] for item in open_storage().list(output)]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """With embeddings that are several tiles in a small budget."""
    return make_family(tmp_path_factory.mktemp("models"), num_experts=2, vocab=24_576)


@pytest.fixture
def bench(s3_env: S3Server, bucket: str, family: Family, tmp_path: Path) -> Bench:
    merge(recipe(family, "emr"), str(tmp_path / "shared"))
    run_plan(plan_second(str(tmp_path / "shared"), str(tmp_path / "own")), open_storage())
    document = {
        "merge_method": "emr",
        "base_model": upload_folder(s3_env, family.base, bucket, "base"),
        "models": [
            {"model": upload_folder(s3_env, expert, bucket, f"experts/{number}")}
            for number, expert in enumerate(family.experts)
        ],
    }
    return Bench(s3_env, bucket, document, weight_bytes(tmp_path / "own"))


def merge(document: dict[str, Any], output: str) -> None:
    options = MergeOptions(**SIZES)
    run_plan(make_plan(parse_recipe(document), open_storage(), options, output), open_storage())


def plan_second(shared: str, output: str) -> Plan:
    return plan_rebuild(shared, "2", open_storage(), MergeOptions(**SIZES), output)


def test_from_s3_to_s3_it_reads_what_it_needs_once_within_the_budget(
    bench: Bench, tmp_path: Path
) -> None:
    shared, output = bench.at("shared"), bench.at("own")
    merge(bench.document, shared)
    plan = plan_second(shared, output)
    weights = sum(shard.size for shard in plan.shards)
    assert plan.totals.bytes_read < 2.1 * weights, "base, shared model, and a bit for each entry"
    before = bench.s3.bytes_sent(bench.bucket)
    report = run_plan(plan, open_storage())
    sent = bench.s3.bytes_sent(bench.bucket) - before
    assert report["bytes_read"] == plan.totals.bytes_read
    assert plan.totals.bytes_read <= sent < 1.05 * plan.totals.bytes_read
    assert report["peak_buffer_bytes"] <= plan.memory_budget
    assert report["method"] == "emr"
    assert weight_bytes(download_prefix(bench.s3, output, tmp_path / "fetched")) == bench.expected
    assert verify_published(output, open_storage())
    assert not [name for name in bench.names(output) if name.startswith(".mergeyard")]


def test_broken_off_it_shows_no_checkpoint_and_goes_on_from_there(
    bench: Bench, tmp_path: Path
) -> None:
    shared, output = bench.at("shared"), bench.at("own")
    merge(bench.document, shared)
    plan = plan_second(shared, output)
    made: list[int] = []
    is_resumed = False

    def engine(work: ShardWork, *args: Any, **options: Any) -> Receipt:
        if made and not is_resumed:
            raise Cancelled("Stopped here.")
        made.append(work.shard.index)
        return run_shard(work, *args, **options)

    with pytest.raises(Cancelled):
        run_plan(plan, open_storage(), engine=engine)
    assert INDEX_NAME not in bench.names(output)
    is_resumed = True
    run_plan(plan_second(shared, output), open_storage(), engine=engine)
    assert made == list(range(len(plan.shards)))
    assert weight_bytes(download_prefix(bench.s3, output, tmp_path / "fetched")) == bench.expected


def test_masks_that_change_meanwhile_are_not_mixed(bench: Bench) -> None:
    shared, output = bench.at("shared"), bench.at("own")
    merge(bench.document, shared)
    plan = plan_second(shared, output)
    [masks, *_] = [name for name in bench.names(shared) if name.startswith("task-masks")]
    storage = open_storage()
    storage.write_bytes(f"{shared}/{masks}", b"another")
    with pytest.raises(StorageError) as caught:
        run_plan(plan, storage)
    assert caught.value.code == "source_changed"
    assert INDEX_NAME not in bench.names(output)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_a_job_on_ray_left_in_s3_is_rebuilt_to_the_bytes_of_a_local_run(
    bench: Bench, tmp_path: Path
) -> None:
    shared, output = bench.at("shared"), bench.at("own")
    with (
        running_service(
            tmp_path / "data", [bench.at("")], {"MERGEYARD_RAY_NUM_CPUS": "2"}
        ) as service,
        service.client() as client,
    ):
        job_id = client.submit(bench.document, shared, options=SIZES)["id"]
        job, _ = finish(client, job_id)
        assert job["state"] == "succeeded", job["error"]
        tasks = client.report(job_id)["task_masks"]
    assert [task["model"] for task in tasks] == [m["model"] for m in bench.document["models"]]
    said = mergeyard(
        *("rebuild", shared, tasks[1]["model"], "--output", output),
        *("--max-shard-size", SIZES["max_shard_size"], "--memory-budget", SIZES["memory_budget"]),
    )
    assert said.status == 0, said.err
    assert weight_bytes(download_prefix(bench.s3, output, tmp_path / "fetched")) == bench.expected
