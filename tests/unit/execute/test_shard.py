import itertools
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.errors import Cancelled, NumericalError, PlanError, StorageError
from merging.execute.pieces import cut_problems
from merging.execute.shard import run_shard
from merging.local_run import run_plan
from merging.plan.plan import PLAN_FORMAT
from merging.receipts import read_receipt
from merging.storage.router import open_storage
from tests.support.checkpoints import make_family
from tests.support.merges import load_merged, plan_merge, weight_bytes


class SpyStorage:
    """The real storage, with every ranged read noted."""

    def __init__(self, inner, *, fail_read_of=None):
        self.inner = inner
        self.reads = []
        self.fail_read_of = fail_read_of

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def read_into(self, uri, start, buffer, *, version):
        if self.fail_read_of and self.fail_read_of in uri:
            raise StorageError(f"{uri} went away.", code="unavailable")
        self.reads.append((uri, start, start + len(buffer)))
        self.inner.read_into(uri, start, buffer, version=version)


@pytest.fixture
def family(tmp_path):
    return make_family(tmp_path / "models", num_experts=3, shards=2)


@pytest.fixture
def big_family(tmp_path):
    """Four models of about 18 MB each."""
    return make_family(tmp_path / "big", num_experts=3, hidden=256, layers=6, vocab=2048)


def run_all(plan, storage, **options):
    digest = plan.digest
    return [run_shard(plan.work(s.index, digest), storage, **options) for s in plan.shards]


def mean_of(family, name):
    return torch.stack([state[name].float() for state in family.expert_states]).mean(0)


def test_a_linear_merge_is_the_mean_of_every_tensor(family, tmp_path):
    storage = open_storage()
    plan = plan_merge(family, "linear", storage, tmp_path / "out", max_shard_size="150kB")
    assert len(plan.shards) > 1
    run_plan(plan, storage)
    merged = load_merged(tmp_path / "out")
    assert merged.keys() == family.base_state.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, mean_of(family, name), rtol=1e-6, atol=1e-7)


def test_every_planned_byte_is_read_exactly_once_and_no_other(big_family, tmp_path):
    spy = SpyStorage(open_storage())
    plan = plan_merge(big_family, "linear", spy, tmp_path / "out", memory_budget="4MiB")
    spy.reads.clear()
    receipts = run_all(plan, spy)
    planned = sorted(
        (plan.files[source.file].uri, source.start, source.end)
        for shard in plan.shards
        for problem in shard.problems
        for source in problem.experts
    )
    assert sum(end - start for _, start, end in spy.reads) == plan.totals.bytes_read
    assert sum(receipt.bytes_read for receipt in receipts) == plan.totals.bytes_read
    assert merge_ranges(spy.reads) == merge_ranges(planned)


def merge_ranges(ranges):
    """Union of ranges; fails if any two overlap."""
    merged = []
    for uri, start, end in sorted(ranges):
        if merged and merged[-1][0] == uri:
            assert start >= merged[-1][2]
            if start == merged[-1][2]:
                merged[-1] = (uri, merged[-1][1], end)
                continue
        merged.append((uri, start, end))
    return merged


def test_neighbouring_tensors_are_read_together(family, tmp_path):
    spy = SpyStorage(open_storage())
    plan = plan_merge(family, "linear", spy, tmp_path / "out")
    spy.reads.clear()
    (receipt,) = run_all(plan, spy)
    num_sources = sum(len(problem.experts) for problem in plan.shards[0].problems)
    assert receipt.read_requests == len(spy.reads)
    assert receipt.read_requests < num_sources / 4


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "dare_ties"])
def test_bytes_do_not_depend_on_how_the_budget_cuts_tensors(big_family, tmp_path, method):
    storage = open_storage()
    outputs = []
    for budget in ("4MiB", "16MiB", "1GiB"):
        output = tmp_path / f"out-{budget}"
        plan = plan_merge(big_family, method, storage, output, memory_budget=budget)
        pieces = [len(list(cut_problems(plan.work(s.index, "")))) for s in plan.shards]
        outputs.append((sum(pieces), run_plan(plan, storage) and weight_bytes(output)))
    assert outputs[0][0] > outputs[2][0], "the small budget must really have cut tensors"
    assert outputs[0][1] == outputs[1][1] == outputs[2][1]


@pytest.mark.parametrize(("method", "budget"), [("linear", "4MiB"), ("wudi_cfs", "12MiB")])
def test_buffers_stay_within_a_budget_far_below_the_models_size(
    big_family, tmp_path, method, budget
):
    storage = open_storage()
    plan = plan_merge(big_family, method, storage, tmp_path / "out", memory_budget=budget)
    assert plan.totals.bytes_read > 5 * plan.memory_budget
    receipts = run_all(plan, storage)
    assert max(receipt.peak_buffer_bytes for receipt in receipts) <= plan.memory_budget


def test_progress_counts_rise_to_the_whole_shard(family, tmp_path):
    storage = open_storage()
    plan = plan_merge(family, "linear", storage, tmp_path / "out")
    seen = []
    run_all(plan, storage, on_progress=seen.append)
    for earlier, later in itertools.pairwise(seen):
        assert later.bytes_read >= earlier.bytes_read
        assert later.bytes_written >= earlier.bytes_written
        assert later.tensors_written <= later.tensors_solved <= later.tensors_fetched
    tensors = plan.totals.tensors
    last = seen[-1]
    assert (last.tensors_fetched, last.tensors_solved, last.tensors_written) == (tensors,) * 3
    assert (last.bytes_read, last.bytes_written) == (
        plan.totals.bytes_read,
        plan.shards[0].size,
    )


def test_stages_are_told_as_the_receipt_sums_them_up(family, tmp_path):
    storage = open_storage()
    plan = plan_merge(family, "linear", storage, tmp_path / "out")
    told = Counter()
    [receipt] = run_all(
        plan, storage, on_stage=lambda stage, seconds: told.update({stage: seconds})
    )
    stages = {name: seconds for name, seconds in receipt.seconds.items() if name != "total"}
    assert told == pytest.approx(stages)
    assert all(told.values())
    assert sum(told.values()) <= receipt.seconds["total"]


def test_a_stage_that_fails_is_told(family, tmp_path):
    storage = open_storage()
    plan = plan_merge(family, "linear", storage, tmp_path / "out")
    for file in family.experts[0].glob("*.safetensors"):
        file.unlink()
    told = []
    with pytest.raises(StorageError):
        run_all(plan, storage, on_stage=lambda stage, _: told.append(stage))
    assert "fetch" in told


def test_cancelling_leaves_neither_file_nor_receipt(family, tmp_path):
    storage = open_storage()
    plan = plan_merge(family, "linear", storage, tmp_path / "out")
    calls = iter([False, False, True])
    with pytest.raises(Cancelled):
        run_all(plan, storage, cancelled=lambda: next(calls))
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("method", ["linear", "wudi_cfs", "ties"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named(family, tmp_path, method, value):
    name = "model.layers.1.mlp.up_proj.weight"
    path = next(f for f in family.experts[1].glob("*.safetensors") if name in load_file(f))
    tensors = load_file(path)
    tensors[name][3, 5] = value
    save_file(tensors, path, metadata={"format": "pt"})
    storage = open_storage()
    plan = plan_merge(family, method, storage, tmp_path / "out")
    with pytest.raises(NumericalError) as caught:
        run_plan(plan, storage)
    assert caught.value.code == "non_finite_input"
    assert name in caught.value.detail
    assert str(path) in caught.value.detail
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_non_finite_values_pass_when_the_user_says_so(family, tmp_path):
    name = "model.norm.weight"
    path = next(f for f in family.experts[1].glob("*.safetensors") if name in load_file(f))
    tensors = load_file(path)
    tensors[name][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    storage = open_storage()
    plan = plan_merge(family, "linear", storage, tmp_path / "out", check_finite=False)
    run_plan(plan, storage)
    assert torch.isnan(load_merged(tmp_path / "out")[name][0])


def test_an_overflow_in_the_output_dtype_is_an_error(tmp_path):
    family = make_family(tmp_path / "m", num_experts=2)
    for expert in family.experts:
        (path,) = expert.glob("*.safetensors")
        tensors = load_file(path)
        tensors["model.norm.weight"][0] = 1e6
        save_file(tensors, path, metadata={"format": "pt"})
    from merging.options import MergeOptions
    from merging.plan.planner import make_plan
    from merging.recipe import parse_recipe
    from tests.support.merges import recipe

    storage = open_storage()
    document = recipe(family, "linear") | {"out_dtype": "float16"}
    plan = make_plan(parse_recipe(document), storage, MergeOptions(), str(tmp_path / "out"))
    with pytest.raises(NumericalError, match=r"model\.norm\.weight.*holds 0 NaN and 1 infinite"):
        run_plan(plan, storage)


def test_a_source_that_changes_after_planning_fails_the_shard(family, tmp_path):
    storage = open_storage()
    plan = plan_merge(family, "linear", storage, tmp_path / "out")
    path = min(family.experts[2].glob("*.safetensors"))
    save_file(load_file(path), path, metadata={"format": "pt"})
    with pytest.raises(StorageError) as caught:
        run_plan(plan, storage)
    assert caught.value.code == "source_changed"
    assert str(path) in caught.value.detail
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_failing_read_leaves_no_file_behind(family, tmp_path):
    storage = SpyStorage(open_storage())
    plan = plan_merge(family, "linear", storage, tmp_path / "out")
    storage.fail_read_of = "expert-1"
    with pytest.raises(StorageError, match="went away"):
        run_all(plan, storage)
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


def test_an_unwritable_output_is_an_error_of_storage(family, tmp_path):
    storage = open_storage()
    (tmp_path / "file").write_text("not a folder")
    plan = plan_merge(family, "linear", storage, tmp_path / "file" / "out")
    with pytest.raises(StorageError) as caught:
        run_plan(plan, storage)
    assert str(tmp_path / "file") in caught.value.detail


def test_a_plan_of_another_format_is_refused(family, tmp_path):
    import msgspec

    storage = open_storage()
    plan = plan_merge(family, "linear", storage, tmp_path / "out")
    work = msgspec.structs.replace(plan.work(0, plan.digest), format=99)
    with pytest.raises(PlanError, match=f"format {PLAN_FORMAT}, the plan has 99"):
        run_shard(work, storage)


def test_published_shards_are_taken_over_after_an_interruption(family, tmp_path):
    spy = SpyStorage(open_storage())
    plan = plan_merge(family, "linear", spy, tmp_path / "out", max_shard_size="150kB")
    run_shard(plan.work(0, plan.digest), spy)
    first = plan.shards[0]
    assert read_receipt(spy, plan.output_uri, plan.digest, plan.shards[0]) is not None
    spy.reads.clear()
    run_plan(plan, spy)
    weights = sum(end - start for uri, start, end in spy.reads if "/models/" in uri)
    assert weights == plan.totals.bytes_read - first.bytes_read


def test_zero_task_vectors_give_back_the_base(tmp_path):
    family = make_family(tmp_path / "m", num_experts=2, rms=0.0)
    storage = open_storage()
    for method in ("wudi", "wudi_cfs", "ties"):
        output = tmp_path / method
        run_plan(plan_merge(family, method, storage, output), storage)
        merged = load_merged(output)
        for name, tensor in family.base_state.items():
            assert torch.equal(merged[name], tensor), (method, name)
