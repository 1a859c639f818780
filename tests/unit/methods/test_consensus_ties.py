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

LAMBDAS = [0.2, 0.6, 0.4]


def _expected(vectors: list[np.ndarray], kept: list[np.ndarray], *, normalize: bool) -> np.ndarray:
    zero = torch.zeros(vectors[0].shape, dtype=torch.float64)
    merged = oracle.mix(zero, kept, [1.0] * 3, scale=1.0, normalize=normalize, elect=True)
    return oracle.consensus(merged, vectors, LAMBDAS, 2)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_trimmed_by_tensor_equals_the_formula(
    normalize: bool, dtype: torch.dtype, tolerance: float
) -> None:
    base, experts = make_models((61, 83), 3, dtype=dtype, base_rms=0)
    parameters = {"scope": "tensor", "normalize": normalize, "lambda": 0.3}
    settings = [{"density": 0.4, "mask_lambda": one} for one in LAMBDAS]
    merged = merge("consensus_ties", base, experts, parameters, settings)
    vectors = oracle.task_vectors(base, experts)
    kept = [oracle.trim(T, 0.4) for T in vectors]
    expected = 0.3 * _expected(vectors, kept, normalize=normalize)
    assert relative_difference(merged, expected) < tolerance


def test_the_paper_trims_over_the_whole_model(tmp_path: Path) -> None:
    family = make_family(tmp_path / "models", num_experts=3)
    document = recipe(family, "consensus_ties")
    for model, one in zip(document["models"], LAMBDAS, strict=True):
        model["parameters"] = {"mask_lambda": one}
    storage = open_storage()
    plan = make_plan(parse_recipe(document), storage, MergeOptions(), str(tmp_path / "out"))
    run_plan(plan, storage)
    vectors = {
        name: [
            (state[name] - base).double().numpy()  # in float32, as what is compared with thresholds
            for state in family.expert_states
        ]
        for name, base in family.base_state.items()
    }
    thresholds = []
    for number in range(3):
        sizes = np.sort(
            np.concatenate([np.abs(found[number]).ravel() for found in vectors.values()])
        )
        thresholds.append(sizes[len(sizes) - int(0.2 * len(sizes)) - 1])
    merged = load_merged(tmp_path / "out")
    for name, found in vectors.items():
        kept = [
            np.where(np.abs(T) >= threshold, T, 0)
            for T, threshold in zip(found, thresholds, strict=True)
        ]
        expected = family.base_state[name].double().numpy()
        expected = expected + _expected(found, kept, normalize=False)
        np.testing.assert_allclose(merged[name].double().numpy(), expected, rtol=1e-6, atol=1e-7)
