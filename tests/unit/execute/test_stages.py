"""Shards that make files for other shards, on one machine."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from merging.errors import StorageError
from merging.execute.shard import run_shard
from merging.local_run import run_plan
from merging.plan.plan import Plan, file_uri
from merging.plan.stages import shards_left, shards_needed
from merging.plan.timing import estimate_seconds
from merging.receipts import read_receipt
from merging.storage.base import Storage
from merging.storage.router import open_storage
from tests.support.checkpoints import Family, make_family
from tests.support.merges import plan_merge, weight_bytes
from tests.support.rates import rates
from tests.support.staged import in_two_stages

SHARD_BYTES = 150_000


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(tmp_path / "models", num_experts=2)


@pytest.fixture
def storage() -> Storage:
    return open_storage()


def staged(family: Family, storage: Storage, output: Path) -> Plan:
    plan = plan_merge(family, "linear", storage, output, max_shard_size=SHARD_BYTES)
    return in_two_stages(plan, SHARD_BYTES)


def outputs_first(plan: Plan) -> int:
    return plan.outputs[0].index


def test_a_merge_by_way_of_made_files_gives_the_same_files(
    family: Family, storage: Storage, tmp_path: Path
) -> None:
    plain = plan_merge(family, "linear", storage, tmp_path / "a", max_shard_size=SHARD_BYTES)
    run_plan(plain, storage)
    plan = staged(family, storage, tmp_path / "b")
    assert len(plan.shards) > len(plan.outputs) > 1
    report = run_plan(plan, storage)
    assert weight_bytes(tmp_path / "b") == weight_bytes(tmp_path / "a")
    assert not (tmp_path / "b" / ".mergeyard").exists()
    assert [file["name"] for file in report["output"]["files"]] == [
        shard.file_name for shard in plan.outputs
    ]
    assert report["bytes_read"] == plan.totals.bytes_read
    assert report["bytes_intermediate"] == plan.totals.bytes_intermediate > 0
    assert len(report["tensors"]) == plan.totals.tensors == report["totals"]["tensors"]


def test_a_plan_with_made_files_survives_serialising(
    family: Family, storage: Storage, tmp_path: Path
) -> None:
    plan = staged(family, storage, tmp_path / "out")
    assert Plan.from_json(plan.to_json()) == plan


def test_shards_need_those_whose_files_they_read(
    family: Family, storage: Storage, tmp_path: Path
) -> None:
    plan = staged(family, storage, tmp_path / "out")
    needed = shards_needed(plan)
    first = outputs_first(plan)
    assert not any(needed[:first])
    assert frozenset().union(*needed[first:]) == set(range(first))
    assert all(max(indexes) < first for indexes in needed[first:])


def test_an_made_file_is_pinned_to_the_version_that_was_written(
    family: Family, storage: Storage, tmp_path: Path
) -> None:
    plan = staged(family, storage, tmp_path / "out")
    first = outputs_first(plan)
    receipts = [run_shard(plan.work(i, plan.digest), storage) for i in range(first)]
    work = plan.work(first, plan.digest, {r.shard_index: r.versions for r in receipts})
    changed = file_uri(plan.output_uri, plan.digest, plan.shards[0])
    data = storage.read_bytes(changed, limit=1 << 30)
    storage.write_bytes(changed, data)
    assert read_receipt(storage, plan.output_uri, plan.digest, plan.shards[0]) is None
    with pytest.raises(StorageError) as caught:
        run_shard(work, storage)
    assert caught.value.code == "source_changed"
    assert caught.value.context["uri"] == changed


def test_a_run_resumes_in_the_second_stage(
    family: Family, storage: Storage, tmp_path: Path
) -> None:
    plan = staged(family, storage, tmp_path / "out")
    done: list[int] = []

    def engine(work, *arguments, **options):
        done.append(work.shard.index)
        if work.shard.index == len(plan.shards) - 1 and len(done) == len(plan.shards):
            raise StorageError("The machine goes down.", code="unavailable")
        return run_shard(work, *arguments, **options)

    with pytest.raises(StorageError):
        run_plan(plan, storage, engine=engine)
    run_plan(plan, storage, engine=engine)
    assert done == [*range(len(plan.shards)), len(plan.shards) - 1]


def test_what_nothing_reads_any_more_is_not_made_again(
    family: Family, storage: Storage, tmp_path: Path
) -> None:
    plan = staged(family, storage, tmp_path / "out")
    outputs = {shard.index for shard in plan.outputs}
    assert shards_left(plan, outputs) == set()
    last = max(outputs)
    assert shards_left(plan, outputs - {last}) == {last, *shards_needed(plan)[last]}
    assert shards_left(plan, set()) == set(range(len(plan.shards)))


def test_the_estimate_waits_for_what_a_shard_needs(
    family: Family, storage: Storage, tmp_path: Path
) -> None:
    plan = staged(family, storage, tmp_path / "out")
    estimate = estimate_seconds(plan, rates(), slots=100)
    assert estimate is not None
    first = outputs_first(plan)
    assert estimate.total_seconds > max(estimate.shards[:first])
    alone = estimate_seconds(plan, rates(), slots=1)
    assert alone is not None
    assert alone.total_seconds == pytest.approx(sum(alone.shards))


def test_figures_of_intermediate_work_are_told_with_the_tensor(
    family: Family, storage: Storage, tmp_path: Path
) -> None:
    from merging.report import build_report

    plan = staged(family, storage, tmp_path / "out")
    name = plan.outputs[0].problems[0].tensor_name
    receipts = []
    for shard in plan.shards:
        versions = {receipt.shard_index: receipt.versions for receipt in receipts}
        receipt = run_shard(plan.work(shard.index, plan.digest, versions), storage)
        kind = {"loss_before": 2.0} if not shard.is_output else {"loss_after": 1.0}
        problems = tuple(
            msgspec.structs.replace(p, figures=kind, solve_seconds=1.0) for p in receipt.problems
        )
        receipts.append(msgspec.structs.replace(receipt, problems=problems))
    [told] = [t for t in build_report(plan, receipts)["tensors"] if t["name"] == name]
    assert (told["loss_before"], told["loss_after"], told["seconds"]) == (2.0, 1.0, 2.0)
