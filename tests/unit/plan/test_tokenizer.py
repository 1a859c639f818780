from __future__ import annotations

import json
from typing import Any

import pytest

from merging.errors import CheckpointError, MergeError, StorageError
from merging.options import MergeOptions
from merging.plan.plan import ALIGN, Plan
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from tests.support.header_checkpoints import llama_tensors, put_checkpoint
from tests.support.memory_storage import MemoryStorage

A, B, C, OUTPUT = "mem://models/a", "mem://models/b", "mem://models/c", "mem://out/merged"
VOCAB = {"a": 0, "b": 1, "c": 2}


def put_tokenizer(storage: MemoryStorage, uri: str, vocab: Any, **added: int) -> None:
    tokens = [{"id": number, "content": token, "special": True} for token, number in added.items()]
    document = {
        "version": "1.0",
        "added_tokens": tokens,
        "normalizer": None,
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a b"]},
    }
    storage.write_bytes(f"{uri}/tokenizer.json", json.dumps(document).encode())


@pytest.fixture
def storage() -> MemoryStorage:
    """Three models of one vocabulary."""
    memory = MemoryStorage()
    companions = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    for uri in (A, B, C):
        put_checkpoint(memory, uri, llama_tensors(), companions=companions)
        put_tokenizer(memory, uri, VOCAB, end=3)
    return memory


def plan(storage: MemoryStorage, source: str | None) -> Plan:
    recipe = {"merge_method": "linear", "models": [{"model": A}, {"model": B}]}
    if source is not None:
        recipe["tokenizer_source"] = source
    return make_plan(parse_recipe(recipe), storage, MergeOptions(), OUTPUT)


def refusal(storage: MemoryStorage, source: str) -> MergeError:
    with pytest.raises(MergeError) as caught:
        plan(storage, source)
    assert [fault.pointer for fault in caught.value.faults] == ["/tokenizer_source"]
    return caught.value


def folders(found: Plan) -> dict[str, str]:
    """Which model each companion is of."""
    return {c.file_name: c.source_uri.rsplit("/", 1)[0] for c in found.companions}


@pytest.mark.parametrize("source", ["base", "union"])
def test_models_of_one_vocabulary_have_the_tokenizer_of_the_first(
    storage: MemoryStorage, source: str
) -> None:
    found = plan(storage, source)
    assert found.companions == plan(storage, None).companions
    assert set(folders(found).values()) == {A}
    assert not found.warnings


def test_tokenizer_of_another_model_comes_with_its_chat_template_and_nothing_else(
    storage: MemoryStorage,
) -> None:
    assert folders(plan(storage, C)) == {
        "chat_template.jinja": C,
        "generation_config.json": A,
        "tokenizer.json": C,
        "tokenizer_config.json": C,
    }


@pytest.mark.parametrize(
    ("vocab", "added"),
    [
        ({"a": 0, "b": 1}, {"end": 3}),
        ({"a": 0, "d": 1, "b": 2, "c": 3}, {"end": 4}),
        ({**VOCAB, "b": 2, "c": 1}, {"end": 3}),
        (VOCAB, {"end": 4}),
        (VOCAB, {"start": 3}),
        ([["a", 0.0], ["c", -1.5], ["b", -2.0]], {"end": 3}),
    ],
)
def test_models_of_different_vocabularies_are_put_in_one_order(
    storage: MemoryStorage, vocab: Any, added: dict[str, int]
) -> None:
    put_tokenizer(storage, B, vocab, **added)
    found = plan(storage, "base")
    aligned = [s for s in found.settings if s.method == ALIGN]
    assert len(aligned) == 1  # head and embedding share it; those of A are read as they lie
    assert {p.tensor_name for s in found.shards if not s.is_output for p in s.problems} == {
        "lm_head.weight",
        "model.embed_tokens.weight",
    }
    assert found.config["vocab_size"] == 4


def test_model_without_a_vocabulary_is_taken_to_agree_with_a_warning(
    storage: MemoryStorage,
) -> None:
    storage.delete(f"{B}/tokenizer.json")
    [warning] = plan(storage, "base").warnings
    assert f"{B} has no tokenizer.json" in warning


def test_source_without_a_tokenizer_is_refused(storage: MemoryStorage) -> None:
    storage.delete(f"{C}/tokenizer.json")
    assert "has no tokenizer.json" in refusal(storage, C).detail


def test_source_that_is_not_there_is_told_of_its_place(storage: MemoryStorage) -> None:
    assert isinstance(refusal(storage, "mem://models/none"), StorageError)


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"[]",
        b"\xff",
        b'{"model": {"vocab": {"a": "b"}}}',
        b'{"model": {"vocab": [[1, 2]]}}',
        b'{"model": {"vocab": [[]]}}',
        b'{"added_tokens": [{"id": 1}]}',
        b"[" * 100_000,
    ],
)
def test_damaged_tokenizer_is_refused(storage: MemoryStorage, data: bytes) -> None:
    storage.write_bytes(f"{B}/tokenizer.json", data)
    with pytest.raises(CheckpointError) as caught:
        plan(storage, "base")
    assert caught.value.code == "config_invalid"
    assert f"{B}/tokenizer.json" in caught.value.detail


def test_tokenizers_are_not_looked_at_without_the_key(storage: MemoryStorage) -> None:
    storage.write_bytes(f"{B}/tokenizer.json", b"{")
    assert plan(storage, None)
