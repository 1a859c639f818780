from pathlib import Path

import numpy as np
import pytest
import torch

from merging.local_run import run_plan
from merging.ops.low_rank import Adapter
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support import oracle
from tests.support.checkpoints import make_family
from tests.support.merges import load_merged, recipe
from tests.support.tensors import make_models, merge, relative_difference

WEIGHTS = [0.75, 1.0, 0.5]
DENSITIES = [0.2, 0.5, 1.0]
SHAPES = [(24, 40), (90, 20), (32, 32)]
LAYERS = ("self_attn", "mlp")


def _settings() -> list[dict[str, float]]:
    return [{"weight": w, "density": d} for w, d in zip(WEIGHTS, DENSITIES, strict=True)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_equals_ties_in_the_common_basis(
    shape: tuple[int, int], normalize: bool, dtype: torch.dtype, tolerance: float
) -> None:
    base, experts = make_models(shape, 3, dtype=dtype, base_rms=0)
    merged = merge(
        "knots_ties", base, experts, {"normalize": normalize, "lambda": 0.8}, _settings()
    )
    expected = oracle.knots_ties(
        oracle.task_vectors(base, experts),
        WEIGHTS,
        lambda number, part: oracle.trim(part, DENSITIES[number]),
        normalize=normalize,
    )
    assert relative_difference(merged, 0.8 * expected) < tolerance


def test_without_election_to_decide_it_is_task_arithmetic() -> None:
    """One expert is turned there and back."""
    base, experts = make_models((24, 40), 1, dtype=torch.float64)
    torch.testing.assert_close(merge("knots_ties", base, experts), experts[0])


def test_transposed_tensors_are_solved_as_their_transpose() -> None:
    base, experts = make_models((20, 12), 3, dtype=torch.float64)
    turned = [expert.t().contiguous() for expert in experts]
    stored = merge("knots_ties", base.t().contiguous(), turned, {}, _settings(), transposed=True)
    torch.testing.assert_close(stored.t(), merge("knots_ties", base, experts, {}, _settings()))


@pytest.mark.parametrize("transposed", [False, True])
def test_adapters_are_merged_in_their_span(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = [
        Adapter(
            torch.randn((48, rank), generator=generator, dtype=torch.float64),
            torch.randn((rank, 64), generator=generator, dtype=torch.float64),
            0.5,
        )
        for rank in (3, 5, 2)
    ]
    base = torch.zeros(48, 64, dtype=torch.float64)
    dense = [0.5 * adapter.up @ adapter.down for adapter in adapters]
    merged = merge("knots_ties", base, adapters, {}, _settings(), transposed=transposed)  # type: ignore[arg-type] # it takes both
    expected = merge("knots_ties", base, dense, {}, _settings(), transposed=transposed)
    torch.testing.assert_close(merged, expected)


def test_an_expert_equal_to_the_base_changes_nothing() -> None:
    base, experts = make_models((24, 40), 3, dtype=torch.float64)
    with_base = merge("knots_ties", base, [experts[0], base, *experts[1:]])
    torch.testing.assert_close(with_base, merge("knots_ties", base, experts))


def test_the_global_trim_is_over_all_layers(tmp_path: Path) -> None:
    family = make_family(tmp_path / "models", num_experts=3)
    document = recipe(family, "knots_ties")
    for model, density in zip(document["models"], DENSITIES, strict=True):
        model["parameters"] = {"density": density}
    storage = open_storage()
    plan = make_plan(parse_recipe(document), storage, MergeOptions(), str(tmp_path / "out"))
    run_plan(plan, storage)
    layers = [name for name in family.base_state if any(part in name for part in LAYERS)]
    vectors = {
        name: oracle.task_vectors(
            family.base_state[name], [state[name] for state in family.expert_states]
        )
        for name in layers
    }
    thresholds = []
    for number, density in enumerate(DENSITIES):
        parts = [oracle.knots_parts(found)[1][number] for found in vectors.values()]
        sizes = np.sort(np.concatenate([np.abs(part).ravel() for part in parts]))
        thresholds.append(sizes[len(sizes) - int(density * len(sizes)) - 1] if density < 1 else 0)
    merged = load_merged(tmp_path / "out")
    for name, found in vectors.items():
        expected = oracle.knots_ties(
            found,
            [1.0] * 3,
            lambda number, part: np.where(np.abs(part) >= thresholds[number], part, 0),
        )
        update = merged[name].double() - family.base_state[name].double()
        assert relative_difference(update, expected) < 2e-3
