"""Every method through plan and shards: the same bytes however the work is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from merging.local_run import run_plan
from merging.method import all_methods
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.checkpoints import Family, make_family
from tests.support.merges import load_merged

METHODS = sorted(name for name, method in all_methods().items() if not method.calibrated)

SETTINGS: dict[str, dict[str, Any]] = {
    "doge": {"steps": 5},
    "nearswap": {"t": 1e-3},
    "optmerge": {"steps": 5},
    "slerp": {"t": 0.3},
    "wudi": {"steps": 5},
}
"""What has no default, or takes long."""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("models")
    return make_family(folder, num_experts=3, layers=1, hidden=64, dtype=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("method_name", METHODS)
def test_bytes_do_not_depend_on_files_and_budgets(
    method_name: str, family: Family, tmp_path: Path
) -> None:
    method = all_methods()[method_name]
    document: dict[str, Any] = {
        "merge_method": method_name,
        "models": [{"model": str(path)} for path in family.experts[: method.max_experts]],
        "parameters": SETTINGS.get(method_name, {}),
    }
    if "density" in method.expert_parameters.model_fields:
        document["parameters"] |= {"density": 0.4}
    if method.needs_base:
        document["base_model"] = str(family.base)
    storage, found = open_storage(), []
    for number, options in enumerate(({}, {"max_shard_size": 40_000, "memory_budget": "6MiB"})):
        output = tmp_path / str(number)
        plan = make_plan(parse_recipe(document), storage, MergeOptions(**options), str(output))
        report = run_plan(plan, storage)
        assert report["bytes_read"] == plan.totals.bytes_read
        assert len(plan.outputs) == len(list(output.glob("*.safetensors")))
        assert number or len(plan.weights) == 1
        found.append(load_merged(output))
    whole, cut = found
    assert whole.keys() == cut.keys() == family.base_state.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name]), name
        assert torch.isfinite(tensor).all(), name
