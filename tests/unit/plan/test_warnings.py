"""Tensors that a method cannot take, and what a plan warns of."""

from __future__ import annotations

from typing import Any

import pytest

from merging.errors import RecipeError
from merging.method import all_methods
from merging.options import MergeOptions
from merging.plan.cost import takes_matrices
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from tests.support.header_checkpoints import llama_tensors, put_checkpoint
from tests.support.memory_storage import MemoryStorage

BASE, MATH, CODE = "mem://models/base", "mem://models/math", "mem://models/code"
STACK = "model.layers.0.mlp.experts.gate_up_proj"
FOR_MATRICES = [
    name
    for name, method in all_methods().items()
    if takes_matrices(method) and not method.calibrated  # these run the model: no stacks at all
]


@pytest.fixture
def storage() -> MemoryStorage:
    """Models with a tensor that holds the matrices of four experts of a mixture."""
    memory = MemoryStorage()
    tensors = {**llama_tensors(layers=1), STACK: ("BF16", (4, 64, 128))}
    for uri in (BASE, MATH, CODE):
        put_checkpoint(memory, uri, tensors)
    return memory


def plan(storage: MemoryStorage, method: str = "wudi", *experts: str, **parameters: Any) -> Plan:
    recipe = {
        "merge_method": method,
        "base_model": BASE,
        "models": [{"model": uri} for uri in experts or (MATH, CODE)],
        "parameters": parameters,
    }
    return make_plan(parse_recipe(recipe), storage, MergeOptions(), "mem://out/merged")


@pytest.mark.parametrize("method", FOR_MATRICES)
def test_a_method_for_layers_gets_matrices_only_and_leaves_stacks_with_a_warning(
    storage: MemoryStorage, method: str
) -> None:
    found = plan(storage, method)
    solved = [
        p
        for shard in found.outputs
        for p in shard.problems
        if found.settings[p.setting].method == method
    ]
    assert solved
    assert {len(p.shape) for p in solved} == {2}
    [warning] = [w for w in found.warnings if STACK in w]
    assert f"{method} works on single matrices" in warning


@pytest.mark.parametrize("method", FOR_MATRICES)
def test_a_stack_that_an_expression_chooses_for_such_a_method_is_refused(
    storage: MemoryStorage, method: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(storage, method, touch=["experts"])
    [fault] = caught.value.faults
    assert (fault.pointer, fault.code) == ("/parameters/touch", "incompatible_options")
    assert f"{STACK} [4, 64, 128]" in fault.detail
    assert "Set touch to linear or matrices" in fault.detail


def test_vectors_that_are_chosen_for_such_a_method_are_refused_as_well(
    storage: MemoryStorage,
) -> None:
    with pytest.raises(RecipeError, match=r"norm\.weight \[64\]"):
        plan(storage, "wudi", touch="all")
    assert plan(storage, "wudi", touch="matrices").shards


def test_an_elementwise_method_takes_stacks_like_anything_else(storage: MemoryStorage) -> None:
    assert plan(storage, "task_arithmetic").warnings == ()
    assert plan(storage, "task_arithmetic", touch="linear").warnings == ()


class SameVersion(MemoryStorage):
    """Tells equal contents by their version, as ETags do."""

    def stat(self, uri: str) -> Any:
        import dataclasses

        return dataclasses.replace(super().stat(uri), version="same")

    def list(self, prefix: str) -> Any:
        return [self.stat(item.uri) for item in super().list(prefix)]

    def read_into(self, uri: str, start: int, buffer: memoryview, *, version: str) -> None:
        super().read_into(uri, start, buffer, version=super().stat(uri).version)

    def read_bytes(self, uri: str, *, limit: int, version: str | None = None) -> bytes:
        return super().read_bytes(uri, limit=limit)


def test_an_expert_that_is_a_copy_of_the_base_is_warned_of() -> None:
    storage = SameVersion()
    for uri in (BASE, MATH, CODE):
        put_checkpoint(storage, uri, llama_tensors(layers=1))
    assert plan(storage, "task_arithmetic").warnings == (
        f"The expert {MATH} has the files of the base model: it changes nothing.",
        f"The expert {CODE} has the files of the base model: it changes nothing.",
    )


def test_experts_that_are_the_same_are_warned_of_once(storage: MemoryStorage) -> None:
    assert plan(storage, "task_arithmetic", MATH, CODE, MATH, MATH).warnings == (
        f"The expert {MATH} is named more than once, and counts as often.",
    )
    assert plan(storage, "linear", BASE, CODE).warnings == ()
