from __future__ import annotations

from typing import Any

import pytest

from merging.recipe import parse_recipe, validate_recipe
from merging.recipe.tokenizer import TokenChoice, TokenizerChoice


def linear(**changes: Any) -> dict[str, Any]:
    models = [{"model": "a", "parameters": {"weight": 1}}]
    return {"merge_method": "linear", "models": models, **changes}


@pytest.mark.parametrize("source", ["base", "union", "s3://bucket/chat"])
def test_both_ways_to_name_a_tokenizer_say_the_same(source: str) -> None:
    recipe = parse_recipe(linear(tokenizer_source=source))
    assert recipe.tokenizer is not None
    assert recipe.tokenizer.source == source
    assert recipe == parse_recipe(linear(tokenizer={"source": source}))
    assert parse_recipe(recipe.normalised()) == recipe
    assert recipe.digest != parse_recipe(linear()).digest


def test_tokenizer_is_the_union_unless_it_says_otherwise() -> None:
    assert parse_recipe(linear(tokenizer={})).tokenizer == TokenizerChoice("union")


def test_embeddings_of_tokens_are_read_and_written_in_one_form() -> None:
    tokens: dict[str, Any] = {
        "<pad>": {"source": {"kind": "zero"}},
        "<|end|>": {"source": "models/chat", "force": True},
        "a": {"source": {"kind": "model_token", "model": "models/chat", "token": "b"}},
        "c": {"source": {"kind": "model_token", "model": "models/chat", "token_id": 7}},
    }
    tokenizer = {"source": "base", "tokens": tokens, "pad_to_multiple_of": 64}
    recipe = parse_recipe(linear(tokenizer=tokenizer))
    assert recipe.tokenizer is not None
    assert recipe.tokenizer.tokens == {
        "<pad>": TokenChoice(),
        "<|end|>": TokenChoice("models/chat", force=True),
        "a": TokenChoice("models/chat", token="b"),
        "c": TokenChoice("models/chat", token_id=7),
    }
    assert recipe.normalised()["tokenizer"] == tokenizer
    assert parse_recipe(recipe.normalised()) == recipe


@pytest.mark.parametrize(
    ("changes", "pointer", "texts"),
    [
        ({"tokenizer_source": 3}, "/tokenizer_source", ["not 3"]),
        ({"tokenizer": "base"}, "/tokenizer", ["a mapping with 'source'"]),
        ({"tokenizer": {"sorce": "a"}}, "/tokenizer/sorce", ["'source'"]),
        ({"tokenizer": {"source": "hf://a/b"}}, "/tokenizer/source", ["download the model"]),
        ({"tokenizer": {"source": "a+b"}}, "/tokenizer/source", ["the model alone"]),
        ({"tokenizer": {"tokens": ["a"]}}, "/tokenizer/tokens", ["a mapping"]),
        ({"tokenizer": {"tokens": {"a": "b"}}}, "/tokenizer/tokens/a", ["'source'"]),
        ({"tokenizer": {"tokens": {"a/b": {}}}}, "/tokenizer/tokens/a~1b/source", ["kind: zero"]),
        *(
            (
                {"tokenizer": {"tokens": {"a": {"source": source}}}},
                f"/tokenizer/tokens/a/source{at}",
                [text],
            )
            for source, at, text in (
                (3, "", "not 3"),
                ({"kind": "null"}, "/kind", "zero or model_token"),
                ({"kind": "zero", "model": "b"}, "/model", "Unknown key"),
                ({"kind": "model_token", "model": "b"}, "", "one token"),
                (
                    {"kind": "model_token", "model": "b", "token": "c", "token_id": 1},
                    "",
                    "one token",
                ),
                ({"kind": "model_token", "model": "b", "token_id": -1}, "/token_id", "from 0 on"),
                ({"kind": "model_token", "token": "c"}, "/model", "not None"),
            )
        ),
        (
            {"tokenizer": {"tokens": {"a": {"source": "b", "force": 1}}}},
            "/tokenizer/tokens/a/force",
            ["true or false"],
        ),
        *(
            (
                {"tokenizer": {"pad_to_multiple_of": n}},
                "/tokenizer/pad_to_multiple_of",
                ["from 1 to 65536"],
            )
            for n in (0, 1.5, True, "8")
        ),
    ],
)
def test_malformed_tokenizer_is_refused_by_field(
    changes: dict[str, Any], pointer: str, texts: list[str]
) -> None:
    _, faults = validate_recipe(linear(**changes))
    [detail] = [fault.detail for fault in faults if fault.pointer == pointer]
    assert all(text in detail for text in texts), detail
