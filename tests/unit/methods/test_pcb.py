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
from tests.support.merges import load_merged, recipe, weight_bytes
from tests.support.tensors import make_models, merge, relative_difference

WEIGHTS = [0.75, 1.0, 0.5]


@pytest.mark.parametrize("rms", [2.7e-4, 0.5])
@pytest.mark.parametrize("ratio", [0.05, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_equals_the_formula(rms: float, ratio: float, dtype: torch.dtype, tolerance: float) -> None:
    base, experts = make_models((150, 101), 3, dtype=dtype, base_rms=0, rms=rms)
    settings = [{"weight": weight} for weight in WEIGHTS]
    merged = merge("pcb", base, experts, {"ratio": ratio, "lambda": 1.2}, settings)
    expected = 1.2 * oracle.pcb(oracle.task_vectors(base, experts), ratio, WEIGHTS)
    assert relative_difference(merged, expected) < tolerance


def test_an_entry_that_goes_against_the_others_is_left_out() -> None:
    base, experts = make_models((40, 50), 4, dtype=torch.float64, base_rms=0)
    for number, expert in enumerate(experts):
        expert[3, 4] = -1.0 if number == 0 else 0.5
    merged = merge("pcb", base, experts, {"ratio": 0.5})
    assert merged[3, 4] > 0


def test_many_experts_stay_in_range() -> None:
    base, experts = make_models((20, 30), 60, base_rms=0)
    merged = merge("pcb", base, experts)
    expected = oracle.pcb(oracle.task_vectors(base, experts), 0.1, [1.0] * 60)
    assert relative_difference(merged, expected) < 1e-4


@pytest.mark.slow
def test_quantiles_are_those_of_the_whole_model_in_any_budget(tmp_path: Path) -> None:
    family = make_family(tmp_path / "models", num_experts=3, vocab=65_536, layers=1)
    storage = open_storage()
    found = []
    for number, options in enumerate(({}, {"memory_budget": "130MiB"})):
        output = tmp_path / f"out-{number}"
        settings = MergeOptions(max_shard_size="16MB", **options)
        document = parse_recipe(recipe(family, "pcb"))
        plan = make_plan(document, storage, settings, str(output))
        report = run_plan(plan, storage)
        assert report["bytes_read"] == plan.totals.bytes_read
        found.append(weight_bytes(output))
    assert found[0] == found[1]
    names = list(family.base_state)
    flat = [
        np.concatenate(
            [(state[n].double() - family.base_state[n].double()).numpy().ravel() for n in names]
        )
        for state in family.expert_states
    ]
    expected = oracle.pcb(flat, 0.1, [1.0] * 3)
    merged = load_merged(tmp_path / "out-0")
    change = np.concatenate(
        [(merged[n].double() - family.base_state[n].double()).numpy().ravel() for n in names]
    )
    assert relative_difference(change, expected) < 1e-4
