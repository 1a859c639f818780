"""Methods that look at rows of embeddings, or run merged ones, on models of other vocabularies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.merges import load_merged
from tests.support.tokenizers import write_model

pytestmark = pytest.mark.slow

ROWS = ("model.embed_tokens.weight", "lm_head.weight")
WORDS = ["<unk>", "<s>", *"abcdefgh"]
OTHER = ["<unk>", *"hgfe", "<s>", *"dcba"]
MORE = ["<unk>", "x", *"gfe", "<s>", *"dcba", "y"]
"""Without h, and with two words of its own."""
SAMPLES = (["a", "b", "c", "a"], ["<s>", "g", "e"], ["d"], ["f", "c", "<s>", "b", "b"])
State = dict[str, torch.Tensor]


def numbers(folder: Path) -> dict[str, int]:
    document = json.loads((folder / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in document["added_tokens"]}
    return {**document["model"]["vocab"], **added}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """``one`` and ``two``; ``other`` and ``more`` are ``two`` with rows by other vocabularies."""
    write_model(tmp_path / "one", WORDS, ["</s>"], seed=1)
    two = write_model(tmp_path / "two", WORDS, ["</s>"], seed=2)
    rows = numbers(tmp_path / "two")
    for name, words in (("other", OTHER), ("more", MORE)):
        state = write_model(tmp_path / name, words, ["</s>"], seed=3)
        for tensor in ROWS:
            for token, number in numbers(tmp_path / name).items():
                if token in rows:
                    state[tensor][number] = two[tensor][rows[token]]
        [file] = (tmp_path / name).glob("*.safetensors")
        save_file({**two, **{tensor: state[tensor] for tensor in ROWS}}, file, {"format": "pt"})
    return tmp_path


def merge(
    folder: Path,
    method: str,
    names: tuple[str, ...],
    more: Mapping[str, list[str]] = MappingProxyType({}),
    **changes: Any,
) -> tuple[Path, State]:
    """Each model runs the same samples by its own numbers, and what ``more`` has for it."""
    entries = []
    for name in names:
        own = numbers(folder / name)
        samples = [*SAMPLES, *([more[name]] if name in more else [])]
        data = [[own[token] for token in sample] for sample in samples]
        entries.append({"model": f"{folder}/{name}", "calibration": {"data": data}})
    recipe = {"merge_method": method, "models": entries, "calibration": {"batch": 2}, **changes}
    if method == "fisher":
        recipe["calibration"]["labels"] = "given"
    storage, output = open_storage(), folder / "-".join((method, *names))
    plan = make_plan(parse_recipe(recipe), storage, MergeOptions(overwrite=True), str(output))
    report = run_plan(plan, storage)
    assert report["bytes_read"] == plan.totals.bytes_read
    return output, load_merged(output)


@pytest.mark.parametrize("method", ["fisher", "regmean_plus_plus"])
@pytest.mark.parametrize("names", [("one", "other"), ("other", "one")])
def test_numbers_of_tokens_change_nothing(
    models: Path, method: str, names: tuple[str, ...]
) -> None:
    own = tuple(name.replace("other", "two") for name in names)
    _, expected = merge(models, method, own)
    source = str(models / "one")
    _, found = merge(models, method, names, tokenizer_source=source)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["fisher", "regmean_plus_plus"])
def test_tokens_of_one_model_alone_keep_its_rows(models: Path, method: str) -> None:
    output, merged = merge(models, method, ("one", "more"), tokenizer_source="union")
    found = numbers(output)
    for name, tokens in (("one", "h"), ("more", "xy")):
        own, state = numbers(models / name), load_file(next((models / name).glob("*.safetensors")))
        for tensor in ROWS:
            for token in tokens:
                row = state[tensor][own[token]]
                torch.testing.assert_close(merged[tensor][found[token]], row)


def test_merged_blocks_run_tokens_that_the_output_lacks_by_the_experts_own_rows(
    models: Path,
) -> None:
    """As with the union, in which the merged rows of these tokens are the expert's."""
    names, own = ("one", "more"), {"more": ["x", "a", "y"]}
    _, expected = merge(models, "regmean_plus_plus", names, own, tokenizer_source="union")
    source = str(models / "one")
    _, found = merge(models, "regmean_plus_plus", names, own, tokenizer_source=source)
    assert found[ROWS[0]].shape[0] == len(WORDS) + 1
    for name, tensor in expected.items():
        if name not in ROWS:
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)
