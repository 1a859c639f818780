"""Short ways to a plan and its result, for tests of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from merging.method import get_method
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.base import Storage
from tests.support.checkpoints import Family


def recipe(family: Family, method: str, **parameters: Any) -> dict[str, Any]:
    """A recipe that merges all experts of a family."""
    document: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(expert)} for expert in family.experts],
    }
    if get_method(method).needs_base:
        document["base_model"] = str(family.base)
    if parameters:
        document["parameters"] = parameters
    return document


def plan_merge(
    family: Family, method: str, storage: Storage, output: Path | str, **options: Any
) -> Plan:
    """Plan a merge of a family; ``options`` are those of ``MergeOptions``."""
    document = recipe(family, method)
    return make_plan(parse_recipe(document), storage, MergeOptions(**options), str(output))


def load_merged(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a published checkpoint, without masks beside it."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def weight_bytes(folder: Path) -> dict[str, bytes]:
    """Raw contents of the weight files."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}
