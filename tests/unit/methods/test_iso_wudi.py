from pathlib import Path

import numpy as np
import pytest
import torch

from merging.errors import NumericalError
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support import oracle
from tests.support.checkpoints import Family, make_family
from tests.support.merges import load_merged, recipe, weight_bytes
from tests.support.tensors import make_models, merge, relative_difference

SHAPES = [(64, 64, 4), (24, 96, 8), (96, 24, 3), (32, 128, 3)]
LAYERS = ("self_attn", "mlp")


@pytest.mark.parametrize(("rows", "columns", "num_experts"), SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3), (torch.bfloat16, 1e-3)]
)
def test_a_single_layer_keeps_the_whole_of_its_task_vectors(
    rows: int, columns: int, num_experts: int, dtype: torch.dtype, tolerance: float
) -> None:
    base, experts = make_models((rows, columns), num_experts, dtype=dtype, base_rms=0)
    vectors = oracle.task_vectors(base, experts)
    isotropic, kept = oracle.iso_wudi(vectors)
    figures: dict[str, float] = {}
    merged = merge("iso_wudi", base, experts, figures=figures)
    assert relative_difference(merged, isotropic / kept) < tolerance
    assert figures["kept"] == pytest.approx(kept, rel=tolerance)
    assert figures["scale"] == pytest.approx(1 / kept, rel=tolerance)
    share = np.mean([np.sum(merged.double().numpy() * T) / np.sum(T**2) for T in vectors])
    assert share == pytest.approx(1, rel=tolerance)


def test_a_given_scale_goes_before_the_rule() -> None:
    base, experts = make_models((24, 40), 3, dtype=torch.float64)
    isotropic, _ = oracle.iso_wudi(oracle.task_vectors(base, experts))
    merged = merge("iso_wudi", base, experts, {"scale": 2.5})
    np.testing.assert_allclose(merged.numpy(), base.numpy() + 2.5 * isotropic, rtol=1e-9)


def test_figures_are_those_of_the_scaled_update() -> None:
    base, experts = make_models((24, 40), 3, dtype=torch.float64, base_rms=0)
    vectors = oracle.task_vectors(base, experts)
    figures: dict[str, float] = {}
    update = merge("iso_wudi", base, experts, {"scale": 2.0}, figures=figures).numpy()
    assert figures["loss_before"] == pytest.approx(oracle.wudi_loss(vectors, sum(vectors)))
    assert figures["loss_after"] == pytest.approx(oracle.wudi_loss(vectors, update))
    assert figures["update_norm"] == pytest.approx(np.linalg.norm(update))
    removed = 1 - figures["loss_after"] / figures["loss_before"]
    assert figures["interference_removed"] == pytest.approx(removed)


def test_transposed_tensors_are_solved_as_their_transpose() -> None:
    base, experts = make_models((20, 12), 3)
    turned = [expert.t().contiguous() for expert in experts]
    stored = merge("iso_wudi", base.t().contiguous(), turned, transposed=True)
    torch.testing.assert_close(stored.t(), merge("iso_wudi", base, experts), rtol=1e-4, atol=1e-7)


def test_directions_that_no_expert_has_stay_empty() -> None:
    """Adapters leave most singular values at 0: flattening must not fill them."""
    generator = torch.Generator().manual_seed(0)
    experts = [
        torch.randn(60, 2, generator=generator) @ torch.randn(2, 80, generator=generator)
        for _ in range(3)
    ]
    merged = merge("iso_wudi", torch.zeros(60, 80), experts)
    singular = torch.linalg.svdvals(merged.double())
    assert singular[5] == pytest.approx(float(singular[0]), rel=1e-3)
    assert singular[6] < 1e-3 * singular[0]


def test_an_expert_equal_to_the_base_changes_nothing() -> None:
    base, experts = make_models((64, 64), 3)
    with_base = merge("iso_wudi", base, [experts[0], base, *experts[1:]])
    torch.testing.assert_close(with_base, merge("iso_wudi", base, experts), rtol=1e-5, atol=1e-7)


def test_inputs_that_are_not_finite_are_an_error_that_names_the_tensor() -> None:
    base, experts = make_models((8, 8), 3)
    experts[1][2, 3] = torch.nan
    with pytest.raises(NumericalError, match=r"Cannot solve 'model\.w'.*finite"):
        merge("iso_wudi", base, experts, tensor_name="model.w")


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(tmp_path / "models", num_experts=3)


def test_a_model_has_one_scale(family: Family, tmp_path: Path) -> None:
    storage = open_storage()
    document = parse_recipe(recipe(family, "iso_wudi"))
    options = MergeOptions(max_shard_size=100_000)
    plan = make_plan(document, storage, options, str(tmp_path / "out"))
    report = run_plan(plan, storage)
    found = {}
    for name, base in family.base_state.items():
        if any(part in name for part in LAYERS):
            states = [state[name] for state in family.expert_states]
            found[name] = oracle.iso_wudi(oracle.task_vectors(base, states))
    scale = np.mean([1 / kept for _, kept in found.values()])
    merged = load_merged(tmp_path / "out")
    for name, (isotropic, _) in found.items():
        update = merged[name].double() - family.base_state[name].double()
        assert relative_difference(update, scale * isotropic) < 2e-3
    layers = [tensor for tensor in report["tensors"] if tensor["name"] in found]
    assert len(layers) == len(found) == report["totals"]["layers_solved"]
    for tensor in layers:
        assert tensor["scale"] == pytest.approx(scale, rel=1e-4)
        assert {"kept", "loss_before", "loss_after", "effective_rank"} <= tensor.keys()
    assert report["bytes_read"] == plan.totals.bytes_read
    assert not (tmp_path / "out" / ".mergeyard").exists()


def test_bytes_do_not_depend_on_how_work_is_cut(family: Family, tmp_path: Path) -> None:
    storage = open_storage()
    outputs = []
    for number, options in enumerate(({}, {"memory_budget": "2MiB"})):
        output = tmp_path / f"out-{number}"
        settings = MergeOptions(max_shard_size=150_000, **options)
        document = parse_recipe(recipe(family, "iso_wudi"))
        run_plan(make_plan(document, storage, settings, str(output)), storage)
        outputs.append(weight_bytes(output))
    assert outputs[0] == outputs[1]


def test_a_layer_that_one_expert_changed_gets_its_task_vector(tmp_path: Path) -> None:
    family = make_family(tmp_path / "models", num_experts=3, layers=1)
    name = "model.layers.0.self_attn.o_proj.weight"
    from safetensors.torch import load_file, save_file

    for expert in family.experts[1:]:
        file = expert / "model.safetensors"
        state = load_file(file) | {name: family.base_state[name]}
        save_file(state, file, metadata={"format": "pt"})
    storage = open_storage()
    plan = make_plan(
        parse_recipe(recipe(family, "iso_wudi")), storage, MergeOptions(), str(tmp_path / "out")
    )
    run_plan(plan, storage)
    torch.testing.assert_close(
        load_merged(tmp_path / "out")[name], family.expert_states[0][name], rtol=1e-6, atol=1e-8
    )


def test_with_a_given_scale_there_is_nothing_to_reduce(family: Family, tmp_path: Path) -> None:
    document = parse_recipe(recipe(family, "iso_wudi", scale=3.0))
    plan = make_plan(document, open_storage(), MergeOptions(), str(tmp_path / "out"))
    assert plan.outputs == plan.shards
