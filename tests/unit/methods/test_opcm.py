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
from tests.support.merges import load_merged, recipe, weight_bytes
from tests.support.tensors import make_models, merge, relative_difference

LAYERS = ("self_attn", "mlp")


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_equals_the_formula_at_the_experts_mean_norm(
    shape: tuple[int, int], alpha: float, dtype: torch.dtype, tolerance: float
) -> None:
    base, experts = make_models(shape, 4, dtype=dtype, base_rms=0)
    merged = merge("opcm", base, experts, {"alpha": alpha})
    vectors = oracle.task_vectors(base, experts)
    total = oracle.opcm_sum(vectors, alpha)
    norm = np.mean([np.linalg.norm(T) for T in vectors])
    assert relative_difference(merged, total * norm / np.linalg.norm(total)) < tolerance


def test_other_tensors_are_added_as_they_are() -> None:
    base, experts = make_models((24, 40), 3, dtype=torch.float64, base_rms=0)
    merged = merge("opcm", base, experts, tensor_name="model.embed_tokens.weight")
    vectors = oracle.task_vectors(base, experts)
    norm = np.mean([np.linalg.norm(T) for T in vectors])
    total = sum(vectors)
    assert relative_difference(merged, total * norm / np.linalg.norm(total)) < 1e-9


def test_the_order_of_experts_matters() -> None:
    base, experts = make_models((24, 40), 3, base_rms=0)
    merged = merge("opcm", base, experts)
    assert relative_difference(merge("opcm", base, experts[::-1]), merged.double().numpy()) > 0.01


def test_an_expert_that_repeats_another_adds_nothing_that_is_protected() -> None:
    base, experts = make_models((24, 40), 1, dtype=torch.float64, base_rms=0)
    merged = merge("opcm", base, [experts[0], 2 * experts[0]], {"alpha": 0.5})
    assert relative_difference(merged, 1.5 * experts[0].numpy()) < 1e-9


def test_adapters_stay_adapters_of_all_their_ranks() -> None:
    generator = torch.Generator().manual_seed(0)
    adapters = [
        Adapter(
            torch.randn((48, 3), generator=generator), torch.randn((3, 64), generator=generator)
        )
        for _ in range(3)
    ]
    merged = merge("opcm", torch.zeros(48, 64), adapters)  # type: ignore[arg-type] # it takes both
    dense = [adapter.up @ adapter.down for adapter in adapters]
    expected = merge("opcm", torch.zeros(48, 64), dense)
    assert relative_difference(merged, expected.double().numpy()) < 1e-4


def test_a_model_has_one_scale_over_all_tensors(tmp_path: Path) -> None:
    family = make_family(tmp_path / "models", num_experts=3)
    storage = open_storage()
    found = []
    for number, options in enumerate(({}, {"memory_budget": "2MiB"})):
        output = tmp_path / f"out-{number}"
        settings = MergeOptions(max_shard_size=150_000, **options)
        document = parse_recipe(recipe(family, "opcm"))
        run_plan(make_plan(document, storage, settings, str(output)), storage)
        found.append(weight_bytes(output))
    assert found[0] == found[1]
    vectors = {
        name: oracle.task_vectors(base, [state[name] for state in family.expert_states])
        for name, base in family.base_state.items()
    }
    sums = {
        name: oracle.opcm_sum(Ts, 0.5 if any(part in name for part in LAYERS) else None)
        for name, Ts in vectors.items()
    }
    norm = np.mean([np.sqrt(sum(np.sum(Ts[i] ** 2) for Ts in vectors.values())) for i in range(3)])
    scale = norm / np.sqrt(sum(np.sum(total**2) for total in sums.values()))
    merged = load_merged(tmp_path / "out-0")
    for name, total in sums.items():
        update = merged[name].double() - family.base_state[name].double()
        assert relative_difference(update, scale * total) < 2e-3
