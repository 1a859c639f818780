"""What becomes of revisions and architectures that recipes give beside a model's address."""

from __future__ import annotations

from typing import Any

import pytest

from merging.checkpoint.header import encode_header
from merging.errors import MergeError
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from tests.support.header_checkpoints import LLAMA_CONFIG, llama_tensors, put_checkpoint
from tests.support.memory_storage import MemoryStorage

BASE, EXPERT = "mem://models/base", "mem://models/expert"
OTHER = {**LLAMA_CONFIG, "architectures": ["OurLlama"]}


@pytest.fixture
def storage() -> MemoryStorage:
    memory = MemoryStorage()
    put_checkpoint(memory, BASE, llama_tensors(), config=OTHER)
    put_checkpoint(memory, EXPERT, llama_tensors())
    put_checkpoint(memory, f"{EXPERT}@v2", llama_tensors())
    return memory


def plan(storage: MemoryStorage, base: Any, expert: Any) -> Plan:
    recipe = {"merge_method": "ties", "base_model": base, "models": [{"model": expert}]}
    recipe["parameters"] = {"density": 0.5, "weight": 1}
    return make_plan(parse_recipe(recipe), storage, MergeOptions(), "mem://out/merged")


def named(path: str, revision: str | None = None, **changes: Any) -> dict[str, Any]:
    return {"model": {"path": path, "revision": revision}, **changes}


def test_architecture_goes_into_the_config_and_changes_no_tensor(storage: MemoryStorage) -> None:
    as_they_are = plan(storage, BASE, EXPERT)
    found = plan(storage, named(BASE, override_architecture="MistralForCausalLM"), EXPERT)
    assert as_they_are.config["architectures"] == ["OurLlama"]
    assert found.config == {**as_they_are.config, "architectures": ["MistralForCausalLM"]}
    assert found.shards == as_they_are.shards


def test_models_that_are_said_to_have_one_architecture_are_not_warned_of(
    storage: MemoryStorage,
) -> None:
    [warning] = plan(storage, BASE, EXPERT).warnings
    assert "architectures" in warning
    same = named(BASE, override_architecture="LlamaForCausalLM")
    assert plan(storage, same, EXPERT).warnings == ()


def test_revision_is_read_from_the_folder_of_that_name(storage: MemoryStorage) -> None:
    for expert in (named(EXPERT, "v2"), f"{EXPERT}@v2"):
        assert [item.uri for item in plan(storage, BASE, expert).inputs] == [BASE, f"{EXPERT}@v2"]


@pytest.mark.parametrize("expert", [named(EXPERT, "v3"), f"{EXPERT}@v3"])
def test_revision_that_is_not_there_is_refused_with_how_to_get_it(
    storage: MemoryStorage, expert: Any
) -> None:
    with pytest.raises(MergeError) as caught:
        plan(storage, BASE, expert)
    [fault] = caught.value.faults
    assert (fault.pointer, fault.code) == ("/models/0/model", "not_found")
    assert "hf download NAME --revision REVISION" in fault.detail


def test_adapter_has_no_architecture(storage: MemoryStorage) -> None:
    uri = "mem://adapters/a"
    storage.write_bytes(
        f"{uri}/adapter_config.json", b'{"peft_type": "LORA", "r": 2, "lora_alpha": 2}'
    )
    factors = encode_header([("base_model.model.a.lora_A.weight", "F32", (2, 4))], {})
    storage.write_bytes(f"{uri}/adapter_model.safetensors", factors + bytes(32))
    with pytest.raises(MergeError) as caught:
        plan(storage, BASE, named(uri, override_architecture="LlamaForCausalLM"))
    assert [fault.pointer for fault in caught.value.faults] == ["/models/0/model"]
    assert "is an adapter" in caught.value.detail
