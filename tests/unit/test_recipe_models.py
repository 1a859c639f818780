"""Models as mappings, the form that mergekit has beside ``path@revision+adapter``."""

from __future__ import annotations

from typing import Any

import pytest

from merging.recipe import parse_recipe, validate_recipe

ARCHITECTURE = "LlamaForCausalLM"


def whole(path: str, **changes: Any) -> dict[str, Any]:
    return {"model": {"path": path}, **changes}


def recipe(model: Any, **changes: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": model}, {"model": "b"}], **changes}


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        (whole("org/a"), "org/a"),
        (whole("org/a", lora=None, override_architecture=None), "org/a"),
        ({"model": "s3://bucket/a"}, "s3://bucket/a"),
        ({"model": {"path": "org/a", "revision": None}}, "org/a"),
        ({"model": {"path": "org/a/", "revision": "refs/pr/1"}}, "org/a@refs/pr/1"),
        (whole("a", lora={"path": "c", "revision": "v1.0"}), "a+c@v1.0"),
        (whole("s3://models/a", lora="s3://adapters/c"), "s3://models/a+s3://adapters/c"),
        ({"model": "file:///a+b", "lora": {"path": "/c"}}, "file:///a+b+/c"),
    ],
)
def test_mapping_says_the_same_as_text(mapping: Any, text: str) -> None:
    assert parse_recipe(recipe(mapping)) == parse_recipe(recipe(text))
    assert parse_recipe(recipe(mapping)).digest == parse_recipe(recipe(text)).digest


def test_mapping_stands_wherever_a_model_is_named() -> None:
    a, b, c = ({"model": {"path": f"models/{name}", "revision": "v2"}} for name in "abc")
    layers = {"layer_range": [0, 2]}
    tokens = {
        "x": {"source": b, "force": True},
        "y": {"source": {"kind": "model_token", "model": b, "token": "x"}},
    }
    beside = {"merge_method": "ties", "parameters": {"weight": 1, "density": 0.5}}

    def documents(a: Any, b: Any, c: Any, tokens: Any, d: Any) -> list[dict[str, Any]]:
        sources = [{"model": b, **layers}, {"model": c, **layers}]
        sliced = [{"sources": sources, "base_model": a}]
        return [
            beside | {"base_model": a, "models": [{"model": b}], "tokenizer_source": b},
            beside | {"base_model": a, "slices": sliced, "tokenizer": {"source": a}},
            beside | {"base_model": a, "modules": {"text_decoder": {"slices": sliced}}},
            beside
            | {"base_model": a, "modules": {"default": {"models": [{"model": c}]}}}
            | {"tokenizer": {"source": "base", "tokens": tokens}},
            {
                "documents": [
                    beside | {"name": "d", "base_model": a, "models": [{"model": b}]},
                    beside | {"base_model": d, "models": [{"model": d}, {"model": c}]},
                ]
            },
        ]

    plain = {
        "x": {"source": "models/b@v2", "force": True},
        "y": {"source": {"kind": "model_token", "model": "models/b@v2", "token": "x"}},
    }
    as_mappings = documents(a, b, c, tokens, whole("d"))
    as_texts = documents("models/a@v2", "models/b@v2", "models/c@v2", plain, "d")
    for mapping, text in zip(as_mappings, as_texts, strict=True):
        assert parse_recipe(mapping) == parse_recipe(text)


def test_architecture_is_kept_for_the_model_wherever_it_is_named() -> None:
    document = {
        "merge_method": "task_arithmetic",
        "base_model": whole("a", override_architecture=ARCHITECTURE),
        "slices": [
            {
                "base_model": whole("c", override_architecture="Other"),
                "sources": [
                    {"model": whole("a", lora="x"), "layer_range": [0, 1]},
                    {"model": "b", "layer_range": [0, 1]},
                ],
            }
        ],
    }
    found = parse_recipe(document)
    assert found.architectures == {"a": ARCHITECTURE, "c": "Other"}
    named = {"model": "a", "override_architecture": ARCHITECTURE}
    plain = found.normalised()
    assert plain["base_model"] == named
    assert plain["slices"][0]["sources"][0]["model"] == {**named, "lora": "x"}
    assert plain["slices"][0]["sources"][1]["model"] == "b"
    assert parse_recipe(plain) == found
    assert parse_recipe(plain).digest == found.digest


def test_architecture_is_part_of_the_digest() -> None:
    digests = {
        parse_recipe(recipe(whole("a", override_architecture=name))).digest
        for name in (None, ARCHITECTURE, "Other")
    }
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("model", "at", "text"),
    [
        ({}, "/model", "not None"),
        ({"path": "a"}, "/path", "Unknown key"),
        (whole("a", loras="b"), "/loras", "'lora'"),
        ({"model": {"path": "a", "revison": "b"}}, "/model/revison", "'revision'"),
        ({"model": {"revision": "b"}}, "/model/path", "not None"),
        ({"model": {"path": "a", "revision": 123}}, "/model/revision", "in quotes"),
        ({"model": {"path": "a", "revision": "b+c"}}, "/model/revision", "branch, tag or commit"),
        ({"model": {"path": "a", "revision": ""}}, "/model/revision", "branch, tag or commit"),
        (whole("hf://a/b"), "/model/path", "download the model"),
        (whole("a+b"), "/model/path", "under 'lora'"),
        ({"model": "a+b"}, "/model", "under 'lora'"),
        (whole("a", lora=["b"]), "/lora", "not ['b']"),
        (whole("a", lora={"path": "b+c"}), "/lora/path", "file:///path"),
        (whole("s3://bucket/a", lora="b"), "/lora", "has a scheme too"),
        (whole("a", override_architecture="a b"), "/override_architecture", "a class"),
        (whole("a", override_architecture=["A"]), "/override_architecture", "a class"),
    ],
)
def test_malformed_mapping_is_refused_by_field(model: Any, at: str, text: str) -> None:
    for document, pointer in (
        (recipe(model), "/models/0/model"),
        (recipe("a", base_model=model, merge_method="ties"), "/base_model"),
    ):
        _, faults = validate_recipe(document)
        [detail] = [fault.detail for fault in faults if fault.pointer == pointer + at]
        assert text in detail


def test_malformed_mapping_of_a_tokens_model_is_refused_by_field() -> None:
    tokenizer = {
        "source": {"model": {"path": ""}},
        "tokens": {"x": {"source": {"model": {"path": "a", "revision": 1}}}},
    }
    _, faults = validate_recipe(recipe("a", tokenizer=tokenizer))
    assert {fault.pointer for fault in faults} == {
        "/tokenizer/source/model/path",
        "/tokenizer/tokens/x/source/model/revision",
    }


def test_model_of_two_architectures_is_refused() -> None:
    models = [
        {"model": whole("a", override_architecture="A")},
        {"model": whole("a", override_architecture="B")},
    ]
    _, faults = validate_recipe({"merge_method": "linear", "models": models})
    [fault] = faults
    assert fault.pointer == "/models/1/model/override_architecture"
    assert "taken for a A elsewhere" in fault.detail
