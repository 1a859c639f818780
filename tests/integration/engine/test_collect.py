"""Collecting what merges left behind: on files, and on a real S3 server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from merging.collect import collect
from merging.execute.shard import run_shard
from merging.options import MergeOptions
from merging.plan.plan import Plan, workspace_uri
from merging.plan.planner import make_plan
from merging.publish import INDEX_NAME, prepare_output, publish
from merging.receipts import read_receipt
from merging.recipe import parse_recipe
from merging.storage.base import Storage
from merging.storage.router import open_storage
from tests.support.checkpoints import make_family
from tests.support.merges import plan_merge, recipe

BEGAN = datetime.now(UTC) - timedelta(minutes=5)
MIB = 1 << 20


@dataclass
class Place:
    """Where a merge goes, and how one breaks off there."""

    plan: Plan
    storage: Storage
    break_off: Callable[[str], None]
    unfinished: Callable[[], int]

    @property
    def output(self) -> str:
        return self.plan.output_uri

    def names(self) -> set[str]:
        return {item.uri[len(self.output) + 1 :] for item in self.storage.list(self.output)}

    def merge(self, count: int) -> None:
        """Publish the first shards of the plan."""
        prepare_output(self.plan, self.storage)
        for shard in self.plan.shards[:count]:
            run_shard(self.plan.work(shard.index, self.plan.digest), self.storage)

    def collect(self, until: timedelta = timedelta(minutes=5)) -> int:
        return collect(self.plan, self.storage, since=BEGAN, until=datetime.now(UTC) + until)


def break_off_locally(uri: str) -> None:
    """A process dies while it writes a file."""
    script = (
        "import os, sys; from merging.storage.local import LocalStorage\n"
        "writer = LocalStorage().open_writer(sys.argv[1], 9)\n"
        "writer.write(b'half'); os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, uri]).returncode == 9


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    storage = open_storage()
    family = make_family(tmp_path / "models", num_experts=2, layers=4)
    if request.param == "local":
        output = tmp_path / "merged"
        plan = plan_merge(family, "linear", storage, output, max_shard_size=100_000)
        yield Place(plan, storage, break_off_locally, lambda: len(list(output.glob(".*.tmp"))))
        return
    server, bucket = (request.getfixturevalue(name) for name in ("s3_env", "bucket"))
    client = server.client()

    def break_off(uri: str) -> None:
        key = uri.removeprefix(f"s3://{bucket}/")
        upload = client.create_multipart_upload(Bucket=bucket, Key=key)
        client.upload_part(
            Bucket=bucket, Key=key, UploadId=upload["UploadId"], PartNumber=1, Body=bytes(5 * MIB)
        )

    def unfinished() -> int:
        return len(client.list_multipart_uploads(Bucket=bucket).get("Uploads", ()))

    output_uri = f"s3://{bucket}/team/merged"
    plan = plan_merge(family, "linear", storage, output_uri, max_shard_size=100_000)
    yield Place(plan, storage, break_off, unfinished)
    for upload in client.list_multipart_uploads(Bucket=bucket).get("Uploads", ()):
        client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def test_everything_of_an_unfinished_merge_goes(place: Place) -> None:
    place.merge(2)
    place.break_off(f"{place.output}/{place.plan.shards[2].file_name}")
    assert len(place.names()) == 2 + 2 + 1  # files, receipts, mark
    assert place.unfinished() == 1
    assert place.collect() == 6
    assert (place.names(), place.unfinished()) == (set(), 0)
    assert place.collect() == 0


def test_all_variants_of_an_unfinished_sweep_go(tmp_path: Path) -> None:
    storage = open_storage()
    family = make_family(tmp_path / "models", num_experts=2, layers=2)
    document = {
        **recipe(family, "task_arithmetic"),
        "sweep": [{"name": name, "parameters": {"lambda": n}} for n, name in enumerate("abc")],
    }
    output = tmp_path / "sweep"
    options = MergeOptions(max_shard_size=100_000)
    plan = make_plan(parse_recipe(document), storage, options, str(output))
    place = Place(plan, storage, break_off_locally, lambda: len(list(output.rglob(".*.tmp"))))
    place.merge(2)
    place.break_off(f"{output}/b/{plan.shards[2].file_name}")
    storage.write_bytes(f"{output}/c/{INDEX_NAME}", b"{}")  # as if it were complete
    place.collect()
    assert place.unfinished() == 0
    assert [path.name for path in output.iterdir()] == ["c"]
    assert place.names() == {
        f"c/{INDEX_NAME}", *(f"c/{shard.file_name}" for shard in plan.shards[:2])
    }  # fmt: skip


def test_intermediate_files_of_all_variants_go(tmp_path: Path) -> None:
    family = make_family(tmp_path / "models", num_experts=2)
    document = {
        **recipe(family, "opcm"),
        "sweep": [{"name": name, "parameters": {"alpha": n / 4}} for n, name in enumerate("abc")],
    }
    output, storage = tmp_path / "sweep", open_storage()
    plan = make_plan(parse_recipe(document), storage, MergeOptions(), str(output))
    place = Place(plan, storage, break_off_locally, lambda: len(list(output.rglob(".*.tmp"))))
    place.merge(1)
    assert plan.shards[0].num_files == 3
    place.break_off(f"{workspace_uri(place.output, plan.digest)}/b/{plan.shards[0].file_name}")
    assert place.unfinished() == 1
    place.collect()
    assert (place.names(), place.unfinished()) == (set(), 0)


def test_what_others_wrote_stays(place: Place) -> None:
    place.merge(3)
    first, second, third = (shard.file_name for shard in place.plan.shards[:3])
    place.storage.write_bytes(f"{place.output}/{first}", b"somebody else's by now")
    strangers = {"notes.txt", "model-00099-of-00099.safetensors", "sub/config.json",
                 ".mergeyard/0123456789abcdef/other.json"}  # fmt: skip
    for name in strangers:
        place.storage.write_bytes(f"{place.output}/{name}", b"x")
    place.collect()
    assert place.names() == {first, *strangers}
    assert not {second, third} & place.names()


def test_the_mark_of_another_merge_stays(place: Place) -> None:
    place.merge(1)
    mark = ".mergeyard/in-progress"
    place.storage.write_bytes(f"{place.output}/{mark}", b"sha256:" + b"5" * 64)
    place.collect()
    assert place.names() == {mark}


def test_a_complete_checkpoint_keeps_its_files(place: Place) -> None:
    place.merge(len(place.plan.shards))
    plan, storage = place.plan, place.storage
    found = [read_receipt(storage, plan.output_uri, plan.digest, shard) for shard in plan.shards]
    receipts = {
        item.uri: storage.read_bytes(item.uri, limit=MIB)
        for item in storage.list(f"{place.output}/.mergeyard")
    }
    publish(plan, [receipt for receipt in found if receipt], storage)
    complete = place.names()
    assert INDEX_NAME in complete
    for uri, data in receipts.items():  # as if its sweep had not come to them
        storage.write_bytes(uri, data)
    place.collect()
    assert place.names() == complete


@pytest.mark.parametrize("until", [timedelta(minutes=-4), timedelta(days=-1)], ids=str)
def test_writes_that_began_after_the_job_ended_are_somebody_elses(
    place: Place, until: timedelta
) -> None:
    place.break_off(f"{place.output}/{place.plan.shards[0].file_name}")
    place.collect(until)
    assert place.unfinished() == 1


@pytest.mark.s3
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_uploads_to_other_names_are_somebody_elses(place: Place) -> None:
    name = place.plan.shards[0].file_name
    others = [f"{place.output}/other.bin", f"{place.output}/sub/{name}", f"{place.output}-2/{name}"]
    for uri in others:
        place.break_off(uri)
    assert place.collect() == 0
    assert place.unfinished() == len(others)


def test_a_file_that_is_still_being_written_stays(tmp_path: Path) -> None:
    storage = open_storage()
    with storage.open_writer(str(tmp_path / "model.safetensors"), 4) as writer:
        writer.write(b"half")
        span = {"since": BEGAN, "until": datetime.now(UTC) + timedelta(minutes=5)}
        assert storage.discard_unfinished(str(tmp_path), ["model.safetensors"], **span) == 0
        writer.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    span = {"since": BEGAN, "until": datetime.now(UTC)}
    assert open_storage().discard_unfinished(str(tmp_path / "none"), ["a"], **span) == 0
