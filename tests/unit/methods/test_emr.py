import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from merging.errors import CheckpointError, MergeError, RecipeError
from merging.execute.shard import run_shard
from merging.local_run import run_plan
from merging.method import MASKS, OWN, Task, get_method
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.publish import prepare_output, publish
from merging.rebuild import plan_rebuild
from merging.receipts import Receipt
from merging.recipe import parse_recipe
from merging.storage.base import Storage
from merging.storage.router import open_storage
from merging.unpublish import unpublish
from merging.verify import verify_published
from tests.support.adapters import make_adapters
from tests.support.checkpoints import Family, make_family
from tests.support.merges import load_merged, recipe, weight_bytes
from tests.support.tensors import make_models, merge

REPORT = "merge_report.json"


@pytest.fixture(scope="module")
def storage() -> Storage:
    return open_storage()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """With embeddings of 1.5 million entries, which are several tiles in a small budget."""
    return make_family(tmp_path_factory.mktemp("models"), num_experts=3, vocab=24_576)


@pytest.fixture(scope="module")
def merged(family: Family, storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("merged") / "out"
    run_plan(plan_emr(family, storage, output, max_shard_size="6MB"), storage)
    return output


def plan_emr(
    family: Family,
    storage: Storage,
    output: Path,
    *,
    parameters: dict[str, Any] | None = None,
    **options: Any,
) -> Plan:
    document = parse_recipe(recipe(family, "emr", **(parameters or {})))
    return make_plan(document, storage, MergeOptions(**options), str(output))


def rebuild(shared: Path, task: str, storage: Storage, output: Path, **options: Any) -> Path:
    plan = plan_rebuild(str(shared), task, storage, MergeOptions(**options), str(output))
    run_plan(plan, storage)
    return output


def task_vectors(base: torch.Tensor, experts: list[torch.Tensor]) -> np.ndarray:
    return np.stack([(expert.float() - base.float()).double().numpy() for expert in experts])


def elected(vectors: np.ndarray) -> np.ndarray:
    """The paper's τ_uni in float64."""
    sign = np.where(vectors.mean(0) > 0, 1.0, -1.0)
    return sign * np.maximum(vectors * sign, 0).max(0)


def rescalers(family: Family) -> list[float]:
    """The paper's, over the whole model as one long vector."""
    totals, kept = np.zeros(3), np.zeros(3)
    for name, base in family.base_state.items():
        vectors = task_vectors(base, [state[name] for state in family.expert_states])
        unified = elected(vectors)
        totals += np.abs(vectors).reshape(3, -1).sum(1)
        masked = np.abs(np.where(vectors * unified > 0, unified, 0))
        kept += masked.reshape(3, -1).sum(1)
    return list(totals / kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shared_model_has_elected_signs_and_largest_magnitudes(dtype: torch.dtype) -> None:
    base, experts = make_models((61, 83), 3, dtype=dtype)
    found = merge("emr", base, experts, {"lambda": 0.5})
    expected = base.double().numpy() + 0.5 * elected(task_vectors(base, experts))
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-6, atol=1e-7)


def test_a_mean_of_zero_elects_the_negative_sign() -> None:
    assert merge("emr", torch.zeros(1), [torch.tensor([2.0]), torch.tensor([-2.0])]).item() == -2


def run_step(step: str, base: torch.Tensor, models: list[torch.Tensor], task: Task) -> torch.Tensor:
    return get_method("emr").step(step).merge(base, iter(models), task)


def task_of(shape: tuple[int, ...], scale: float = 1.0, **values: Any) -> Task:
    parameters = get_method("emr").parameters.model_validate({"lambda": scale})
    return Task("w", parameters, [], shape=shape, **values)


def test_masks_are_packed_bits_of_where_signs_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """In numpy's order, the same over many blocks, and the last byte filled up."""
    monkeypatch.setattr("merging.ops.blocks.CPU_BLOCK", 64)
    base, experts = make_models((7, 59), 3)
    task = task_of((7, 59), 2.0)
    found = run_step(MASKS, base, experts, task).numpy()
    vectors = task_vectors(base, experts)
    unified = elected(vectors)
    agrees = vectors * unified > 0
    np.testing.assert_array_equal(found, np.packbits(agrees.reshape(3, -1), axis=1))
    np.testing.assert_allclose(task.figures["task_sums"], np.abs(vectors).sum((1, 2)), rtol=1e-6)
    kept = 2 * np.abs(agrees * unified).sum((1, 2))
    np.testing.assert_allclose(task.figures["masked_sums"], kept, rtol=1e-6)


def test_a_tasks_tensor_is_the_masked_and_scaled_update_of_the_shared_one() -> None:
    base, [shared] = make_models((7, 59), 1)
    bits = torch.arange(7 * 59) % 3 == 0
    mask = torch.from_numpy(np.packbits(bits.numpy()))
    found = run_step(OWN, base, [shared, mask], task_of((7, 59), 1.5))
    expected = base + (shared - base) * bits.view(7, 59) * 1.5
    assert torch.equal(found, expected)


def test_a_task_vector_that_is_not_finite_is_refused_by_name() -> None:
    experts = [torch.ones(9), torch.full((9,), torch.nan)]
    with pytest.raises(MergeError, match="expert 2 is not finite in 'w'"):
        run_step(MASKS, torch.zeros(9), experts, task_of((9,)))


def test_publishes_an_ordinary_checkpoint_with_masks_beside_it(
    family: Family, storage: Storage, merged: Path
) -> None:
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == family.base_state.keys()
    assert not any(file.startswith("task-masks") for file in index["weight_map"].values())
    report = json.loads((merged / REPORT).read_text())
    assert [task["model"] for task in report["task_masks"]] == [str(e) for e in family.experts]
    found = [task["rescaler"] for task in report["task_masks"]]
    np.testing.assert_allclose(found, rescalers(family), rtol=1e-6)
    masks = sorted(merged.glob("task-masks-*.safetensors"))
    assert len(masks) > 1
    names = {name for file in masks for name in load_file(file)}
    assert names == {f"{name}.task_masks" for name in family.base_state}
    assert {file.name for file in masks} < {f.name for f in verify_published(str(merged), storage)}


@pytest.mark.parametrize("task", [0, 1, 2])
def test_a_rebuilt_model_is_the_papers_and_nearer_to_its_expert_than_the_shared_one(
    family: Family, storage: Storage, merged: Path, tmp_path: Path, task: int
) -> None:
    # By number, and by address.
    name = str(task + 1) if task else str(family.experts[task])
    found = load_merged(rebuild(merged, name, storage, tmp_path / "task"))
    shared, expert = load_merged(merged), family.expert_states[task]
    scale = rescalers(family)[task]
    own = others = 0.0
    for key, base in family.base_state.items():
        vectors = task_vectors(base, [state[key] for state in family.expert_states])
        unified = elected(vectors)
        kept = np.where(vectors[task] * unified > 0, unified, 0)
        expected = base.double().numpy() + scale * kept
        np.testing.assert_allclose(found[key].double().numpy(), expected, rtol=1e-5, atol=1e-6)
        own += float((found[key] - expert[key]).square().sum())
        others += float((shared[key] - expert[key]).square().sum())
    assert own < 0.5 * others


def test_bytes_depend_on_neither_the_cut_into_files_nor_the_budget(
    family: Family, storage: Storage, merged: Path, tmp_path: Path
) -> None:
    run_plan(plan_emr(family, storage, tmp_path / "out", memory_budget="24MiB"), storage)
    small, large = (
        {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
        for folder in (tmp_path / "out", merged)
    )
    assert small.keys() == large.keys()
    assert all(torch.equal(small[name], large[name]) for name in large)
    ours = rebuild(tmp_path / "out", "2", storage, tmp_path / "a")
    theirs = rebuild(merged, "2", storage, tmp_path / "b", max_shard_size="3MB")
    one, other = load_merged(ours), load_merged(theirs)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_bytes_do_not_depend_on_the_order_of_the_work(
    family: Family, storage: Storage, merged: Path, tmp_path: Path
) -> None:
    plan = plan_emr(family, storage, tmp_path / "out", max_shard_size="6MB")
    prepare_output(plan, storage)
    works = [plan.work(shard.index, plan.digest) for shard in reversed(plan.shards)]
    publish(plan, [run_shard(work, storage) for work in works], storage)
    assert weight_bytes(tmp_path / "out") == weight_bytes(merged)


def test_a_merge_that_stopped_goes_on_from_its_receipts(
    family: Family, storage: Storage, merged: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    plan = plan_emr(family, storage, output, max_shard_size="6MB")
    last = plan.shards[-1].index
    assert plan.shards[-1].kind == "masks"
    made: list[int] = []

    def stopping(work: Any, *args: Any, **options: Any) -> Receipt:
        made.append(work.shard.index)
        if made == list(range(last + 1)):
            raise MergeError("stopped", code="internal")
        return run_shard(work, *args, **options)

    with pytest.raises(MergeError, match="stopped"):
        run_plan(plan, storage, engine=stopping)
    assert not (output / "model.safetensors.index.json").exists()
    run_plan(plan, storage, engine=stopping)
    assert made == [*range(last + 1), last]
    assert weight_bytes(output) == weight_bytes(merged)
    first, second = (json.loads((o / REPORT).read_text()) for o in (output, merged))
    assert first["task_masks"] == second["task_masks"]


def test_unpublishing_removes_masks_too(family: Family, storage: Storage, tmp_path: Path) -> None:
    output = tmp_path / "out"
    plan = plan_emr(family, storage, output)
    report = run_plan(plan, storage)
    assert list(output.glob("task-masks-*"))
    unpublish(plan, report, storage)
    assert not [path for path in output.rglob("*") if path.is_file()]


def test_tensors_that_were_not_merged_are_the_shared_ones(
    family: Family, storage: Storage, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run_plan(plan_emr(family, storage, output, parameters={"touch": ["mlp"]}), storage)
    shared = load_merged(output)
    found = load_merged(rebuild(output, "1", storage, tmp_path / "task"))
    assert {n for n in found if not torch.equal(found[n], shared[n])} == {
        name for name in found if "mlp" in name
    }
    assert any("mlp" in name for name in found)


def test_a_rebuilt_model_is_of_the_class_that_the_recipe_told(
    merged: Path, storage: Storage, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shutil.copytree(merged, shared)
    config = json.loads((shared / "config.json").read_text()) | {"architectures": ["OurLlama"]}
    (shared / "config.json").write_text(json.dumps(config))
    plan = plan_rebuild(str(shared), "1", storage, MergeOptions(), str(tmp_path / "task"))
    assert plan.config["architectures"] == ["OurLlama"]


def test_the_shared_models_scale_cancels(
    family: Family, storage: Storage, merged: Path, tmp_path: Path
) -> None:
    """λ = 1/2 is exact in binary but for the rounding of the shared tensors."""
    run_plan(plan_emr(family, storage, tmp_path / "out", parameters={"lambda": 0.5}), storage)
    halved = load_merged(rebuild(tmp_path / "out", "3", storage, tmp_path / "a"))
    whole = load_merged(rebuild(merged, "3", storage, tmp_path / "b"))
    for name, expected in whole.items():
        torch.testing.assert_close(halved[name], expected, rtol=1e-5, atol=1e-6)


def test_an_unknown_task_is_answered_with_those_there_are(
    family: Family, storage: Storage, merged: Path, tmp_path: Path
) -> None:
    for task in ("0", "4", "cats"):
        with pytest.raises(RecipeError, match=f"no task '{task}'") as raised:
            rebuild(merged, task, storage, tmp_path / "task")
        assert str(family.experts[2]) in raised.value.detail


def test_a_checkpoint_without_masks_is_refused(
    family: Family, storage: Storage, tmp_path: Path
) -> None:
    document = parse_recipe(recipe(family, "linear"))
    run_plan(make_plan(document, storage, MergeOptions(), str(tmp_path / "out")), storage)
    with pytest.raises(CheckpointError, match="tells of no tasks' masks"):
        rebuild(tmp_path / "out", "1", storage, tmp_path / "task")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"svc": 0.5}, "leave it out"),
        ({"lambda": 0}, "greater than 0"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(
    family: Family, storage: Storage, tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    with pytest.raises(RecipeError, match=match):
        plan_emr(family, storage, tmp_path / "out", parameters=change)


def test_sweeps_slices_documents_and_other_tokens_are_refused(
    family: Family, storage: Storage, tmp_path: Path
) -> None:
    document = recipe(family, "emr")
    halved = {"name": "half", "parameters": {"lambda": 0.5}}
    sources = [{"model": str(expert), "layer_range": [0, 1]} for expert in family.experts]
    sliced = {name: value for name, value in document.items() if name != "models"}
    copies = {"merge_method": "linear", "models": [{"model": "first"}]}
    refused: list[tuple[Any, str]] = [
        (document | {"sweep": [halved, {"name": "whole"}]}, "Submit it as a merge by itself"),
        (sliced | {"slices": [{"sources": sources}] * 2}, "slices and modules have experts"),
        (
            document | {"tokenizer": {"source": "union", "pad_to_multiple_of": 100}},
            "Leave out the tokenizer",
        ),
        (yaml.safe_dump_all([document | {"name": "first"}, copies]), "Merge it by itself"),
    ]
    for wrong, match in refused:
        with pytest.raises(RecipeError, match=match):
            make_plan(parse_recipe(wrong), storage, MergeOptions(), str(tmp_path / "out"))


def test_a_base_model_that_changed_is_refused_and_one_that_moved_can_be_named(
    storage: Storage, tmp_path: Path
) -> None:
    family = make_family(tmp_path / "models", num_experts=2)
    shared = tmp_path / "out"
    run_plan(plan_emr(family, storage, shared), storage)
    before = load_merged(rebuild(shared, "2", storage, tmp_path / "before"))
    moved = shutil.copytree(family.base, tmp_path / "moved")
    for file in family.base.glob("*.safetensors"):
        os.utime(file, (1, 1))
    with pytest.raises(CheckpointError, match="was changed since") as raised:
        rebuild(shared, "2", storage, tmp_path / "task")
    assert raised.value.code == "digest_mismatch"
    options = MergeOptions()
    output = str(tmp_path / "task")
    run_plan(plan_rebuild(str(shared), "2", storage, options, output, base_uri=str(moved)), storage)
    found = load_merged(tmp_path / "task")
    assert all(torch.equal(found[name], before[name]) for name in before)


def test_masks_of_other_weights_are_refused(
    family: Family, storage: Storage, merged: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(merged, tmp_path / "copied")
    file = next(copied.glob("task-masks-*"))
    masks = load_file(file)
    name = next(iter(masks))
    save_file(masks | {name: masks[name][:2]}, file)
    with pytest.raises(CheckpointError, match="from the same merge") as raised:
        rebuild(copied, "1", storage, tmp_path / "task")
    assert raised.value.context["tensor_name"] == name
    save_file(masks | {"other.task_masks": masks[name].clone()}, file)
    with pytest.raises(CheckpointError, match="masks of 'other'"):
        rebuild(copied, "1", storage, tmp_path / "task")
    report = json.loads((copied / REPORT).read_text())
    tasks = [{"model": "a", "rescaler": -1.0}]
    for change, match in (
        ({"task_masks": [{"model": 3}]}, "task_masks"),
        ({"task_masks": tasks}, "rescaler"),
        ({"method": "linear"}, "by linear has no"),
        ({"inputs": []}, "names no base model"),
        ({"output": {"files": []}}, "names no files of masks"),
    ):
        (copied / REPORT).write_text(json.dumps(report | change))
        with pytest.raises(CheckpointError, match=match):
            rebuild(copied, "1", storage, tmp_path / "task")


def test_adapters_as_experts_have_masks_too(storage: Storage, tmp_path: Path) -> None:
    family = make_adapters(tmp_path / "models", (4, 2))
    document = parse_recipe(family.recipe("emr", family.adapters))
    run_plan(make_plan(document, storage, MergeOptions(), str(tmp_path / "out")), storage)
    shared = load_merged(tmp_path / "out")
    found = load_merged(rebuild(tmp_path / "out", "2", storage, tmp_path / "task"))
    expert = load_file(tmp_path / "models" / "whole-1" / "model.safetensors")
    names = [name for name in found if not torch.equal(shared[name], found[name])]
    assert names
    own, others = (
        sum(float((model[name] - expert[name]).square().sum()) for name in names)
        for model in (found, shared)
    )
    assert own < others
