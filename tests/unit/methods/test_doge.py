from pathlib import Path

import numpy as np
import pytest
import torch

from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support import oracle
from tests.support.checkpoints import make_family
from tests.support.merges import load_merged, recipe
from tests.support.tensors import make_models, merge, relative_difference

LAYERS = ("self_attn", "mlp")


def _threshold(magnitudes: np.ndarray, density: float) -> float:
    ordered = np.sort(magnitudes, axis=None)
    return float(ordered[len(ordered) - int(density * len(ordered)) - 1])


@pytest.mark.parametrize(("rows", "columns", "count"), [(24, 40, 3), (40, 24, 4), (32, 32, 2)])
@pytest.mark.parametrize(("rms", "learning_rate"), [(1e-2, 1e-4), (0.3, 1e-3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_equals_the_authors_loss_by_automatic_differentiation(
    rows: int,
    columns: int,
    count: int,
    rms: float,
    learning_rate: float,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    base, experts = make_models((rows, columns), count, dtype=dtype, base_rms=0, rms=rms)
    settings = {"steps": 60, "learning_rate": learning_rate, "eta": 0.5, "density": 0.4}
    merged = merge("doge", base, experts, settings)
    vectors = oracle.task_vectors(base, experts)
    expected = oracle.doge(
        vectors,
        [np.float32(_threshold(np.abs(T), 0.4)) * (1 - 1e-7) for T in vectors],
        eta=0.5,
        subspace=6,
        steps=60,
        learning_rate=learning_rate,
    )
    assert relative_difference(merged, expected) < tolerance


def test_transposed_tensors_are_solved_as_their_transpose() -> None:
    base, experts = make_models((20, 12), 3, dtype=torch.float64, rms=0.1)
    turned = [expert.t().contiguous() for expert in experts]
    stored = merge("doge", base.t().contiguous(), turned, {"steps": 20}, transposed=True)
    torch.testing.assert_close(stored.t(), merge("doge", base, experts, {"steps": 20}))


def test_an_expert_equal_to_the_base_changes_nothing_but_how_many_directions_each_has() -> None:
    base, experts = make_models((24, 40), 2, dtype=torch.float64, rms=0.1)
    settings = {"steps": 0}
    with_base = merge("doge", base, [experts[0], base, experts[1]], settings)
    torch.testing.assert_close(with_base, merge("doge", base, experts, settings))


def test_every_task_vector_of_a_layer_counts_alike() -> None:
    base, experts = make_models((24, 40), 2, dtype=torch.float64, base_rms=0)
    merged = merge("doge", base, [experts[0], 10 * experts[1]], {"steps": 0, "density": 1.0})
    expected = sum(0.07 * T / T.norm() for T in experts)
    torch.testing.assert_close(merged, expected)


def test_what_is_kept_is_decided_over_the_whole_model(tmp_path: Path) -> None:
    family = make_family(tmp_path / "models", num_experts=3)
    document = recipe(family, "doge", steps=5, learning_rate=1e-5, eta=1.0)
    storage = open_storage()
    plan = make_plan(parse_recipe(document), storage, MergeOptions(), str(tmp_path / "out"))
    run_plan(plan, storage)
    merged = load_merged(tmp_path / "out")
    layers = [name for name in family.base_state if any(part in name for part in LAYERS)]
    vectors = {
        name: [
            (state[name] - family.base_state[name]).double().numpy()
            for state in family.expert_states
        ]
        for name in layers
    }
    thresholds = [
        _threshold(np.concatenate([np.abs(Ts[i]).ravel() for Ts in vectors.values()]), 0.3)
        for i in range(3)
    ]
    for name, base in family.base_state.items():
        if name not in layers:
            assert torch.equal(merged[name], base)
            continue
        expected = oracle.doge(
            vectors[name], thresholds, eta=1.0, subspace=6, steps=5, learning_rate=1e-5
        )
        update = merged[name].double() - base.double()
        assert relative_difference(update, expected) < 1e-3
