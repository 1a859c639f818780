from __future__ import annotations

import json
from typing import Any

import pytest

from merging.errors import CheckpointError
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from tests.support.header_checkpoints import llama_tensors, put_checkpoint
from tests.support.memory_storage import MemoryStorage

MODELS = [f"mem://models/{name}" for name in "abc"]


def plan(storage: MemoryStorage, template: str) -> Plan:
    document = {
        "merge_method": "linear",
        "models": [{"model": uri} for uri in MODELS],
        "chat_template": template,
    }
    return make_plan(parse_recipe(document), storage, MergeOptions(), "mem://out/merged")


def storage_with(*configs: Any) -> MemoryStorage:
    """Models that have these files: a template, or a ``tokenizer_config.json``."""
    storage = MemoryStorage()
    for uri, config in zip(MODELS, configs, strict=True):
        put_checkpoint(storage, uri, llama_tensors())
        if isinstance(config, str):
            storage.write_bytes(f"{uri}/chat_template.jinja", config.encode())
        else:
            data = config if isinstance(config, bytes) else json.dumps(config).encode()
            storage.write_bytes(f"{uri}/tokenizer_config.json", data)
    return storage


@pytest.mark.parametrize(
    ("configs", "chosen"),
    [
        (("{{ 1 }}", "{{ 2 }}", "{{ 2 }}\n"), "{{ 2 }}"),
        (("{{ 1 }}", "{{ 2 }}", "{{ 3 }}"), "{{ 1 }}"),
        (({}, {"chat_template": None}, {"chat_template": "{{ 3 }}"}), "{{ 3 }}"),
        (
            (
                {"chat_template": [{"name": "default", "template": "{{ 2 }}"}, 3]},
                "{{ 1 }}",
                {"chat_template": {"default": "{{ 2 }}", "rag": "{{ 1 }}"}},
            ),
            "{{ 2 }}",
        ),
    ],
)
def test_auto_takes_what_most_models_have_and_the_first_of_equally_many(
    configs: tuple[Any, ...], chosen: str
) -> None:
    found = plan(storage_with(*configs), "auto")
    assert found.chat_template == chosen
    assert "chat_template.jinja" not in {item.file_name for item in found.companions}


def test_auto_without_any_template_has_no_effect_and_says_so() -> None:
    found = plan(storage_with({}, {}, {}), "auto")
    assert found.chat_template is None
    assert "No model has a chat template" in found.warnings[0]


def test_damaged_tokenizer_config_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        plan(storage_with({}, b"{", {}), "auto")


def test_template_of_a_recipe_takes_the_place_of_all_others() -> None:
    storage = storage_with("{{ 1 }}", {}, {})
    storage.write_bytes(f"{MODELS[0]}/additional_chat_templates/rag.jinja", b"{{ 2 }}")
    found = plan(storage, "{{ messages }}")
    assert found.chat_template == "{{ messages }}"
    assert not found.companions
