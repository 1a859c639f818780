"""Merges of adapters against merges of the checkpoints that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from merging.local_run import run_plan
from merging.method import all_methods
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.adapters import AdapterFamily, make_adapters
from tests.support.merges import load_merged


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> AdapterFamily:
    return make_adapters(tmp_path_factory.mktemp("adapters"))


def merge(
    recipe: dict[str, Any], output: Path, **options: Any
) -> tuple[Plan, dict[str, Any], dict[str, torch.Tensor]]:
    storage = open_storage()
    plan = make_plan(parse_recipe(recipe), storage, MergeOptions(**options), str(output))
    report = run_plan(plan, storage)
    return plan, report, load_merged(output)


def compare(
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    base: dict[str, torch.Tensor],
    tolerance: float,
) -> None:
    """Updates agree within a share of theirs, beside float32's rounding of the weights."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        origin = base[name].double()
        update = tensor.double() - origin
        difference = (found[name].double() - tensor.double()).norm()
        rounding = 2.0**-24 * origin.norm()
        assert difference <= tolerance * update.norm() + 4 * rounding, name


PARAMETERS: dict[str, dict[str, Any]] = {
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "nearswap": {"t": 1e-3},
    "passthrough": {"scale": 0.5},
    "slerp": {"t": 0.3},
    "ties": {"density": 0.5},
    "wudi": {"steps": 50},
}


@pytest.mark.parametrize("method", sorted(all_methods()))
def test_adapters_merge_to_what_their_checkpoints_merge_to(
    method: str, family: AdapterFamily, tmp_path: Path
) -> None:
    parameters = PARAMETERS.get(method, {})
    adapters: list[object] = list(family.adapters)
    if not all_methods()[method].needs_base:
        adapters = [f"{family.base}+{adapter}" for adapter in adapters]
    count = all_methods()[method].max_experts
    recipe = family.recipe(method, family.experts[:count], **parameters)
    _, _, expected = merge(recipe, tmp_path / "whole")
    plan, report, found = merge(
        family.recipe(method, adapters[:count], **parameters), tmp_path / "low"
    )
    compare(found, expected, family.base_state, 2e-4)
    assert report["bytes_read"] == plan.totals.bytes_read
