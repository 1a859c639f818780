"""Merges of models whose tokens have different numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from merging.errors import RecipeError
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.plan import ALIGN, Plan
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.adapters import factors, write_adapter
from tests.support.merges import load_merged
from tests.support.tokenizers import write_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BASE = ["<unk>", "<s>", *"abcdefgh"]
CHAT = ["<unk>", "<s>", *"hgfedcba", "x"]
CODE = ["<unk>", *"abcd", "<s>", "x", "y"]
State = dict[str, torch.Tensor]


@pytest.fixture
def models(tmp_path: Path) -> dict[str, State]:
    """Three models; each names its end of a text, two by the same token."""
    return {
        "base": write_model(tmp_path / "base", BASE, ["</s>"], seed=1),
        "chat": write_model(tmp_path / "chat", CHAT, ["</s>", "<|end|>"], seed=2, rows=16),
        "code": write_model(tmp_path / "code", CODE, ["<|end|>"], seed=3),
    }


def merge(folder: Path, recipe: Mapping[str, Any], **options: Any) -> tuple[Plan, State]:
    storage = open_storage()
    document = json.loads(json.dumps(recipe).replace("@", f"{folder}/"))
    plan = make_plan(
        parse_recipe(document), storage, MergeOptions(**options), str(folder / "merged")
    )
    run_plan(plan, storage)
    return plan, load_merged(folder / "merged")


def linear(*names: str, **changes: Any) -> dict[str, Any]:
    """Each model weighs twice as much as the one before it."""
    entries = [
        {"model": f"@{name}", "parameters": {"weight": 2.0**number}}
        for number, name in enumerate(names)
    ]
    return {
        "merge_method": "linear",
        "models": entries,
        "parameters": {"normalize": False},
    } | changes


def numbers(folder: Path) -> dict[str, int]:
    document = json.loads((folder / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in document["added_tokens"]}
    return {**document["model"]["vocab"], **added}


def rows(folder: Path, state: State, name: str) -> dict[str, torch.Tensor]:
    """The rows of a model's tokens."""
    return {token: state[name][n] for token, n in numbers(folder).items() if n < len(state[name])}


def expected(
    folder: Path, models: Mapping[str, State], name: str, token: str, base: str | None
) -> torch.Tensor:
    """The weighted sum of a token's rows, written out plainly from the rules."""
    own = {model: rows(folder / model, state, name) for model, state in models.items()}
    having = [model for model in models if token in own[model]]
    if base in having:
        default = own[base][token]
    elif having:
        default = torch.stack([own[model][token] for model in having]).mean(0)
    else:
        default = torch.zeros(16)
    found = [own[model].get(token, default) for model in models]
    return sum(2.0**n * row for n, row in enumerate(found))  # type: ignore[return-value] # no models, no 0


@pytest.mark.parametrize("source", ["union", "base", "@code"])
@pytest.mark.parametrize("base", [None, "@base"])
def test_rows_are_merged_by_token_whatever_their_numbers(
    tmp_path: Path, models: dict[str, State], source: str, base: str | None
) -> None:
    changes = {"base_model": base} if base else {}
    plan, merged = merge(tmp_path, linear(*models, tokenizer_source=source, **changes))
    found = numbers(tmp_path / "merged")
    assert sorted(found.values()) == list(range(len(found)))
    known = {"union": set(BASE + CHAT + CODE), "base": set(BASE), "@code": set(CODE)}[source]
    assert found.keys() - {"</s>", "<|end|>"} == known
    for name in (EMBEDDING, HEAD):
        assert merged[name].shape == (len(found), 16)
        for token, number in found.items():
            row = expected(tmp_path, models, name, token, base and "base")
            torch.testing.assert_close(merged[name][number], row, rtol=1e-6, atol=1e-6)
    layer = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(
        merged[layer], sum(2.0**n * state[layer] for n, state in enumerate(models.values()))
    )
    assert json.loads((tmp_path / "merged/config.json").read_text())["vocab_size"] == len(found)
    assert plan.totals.bytes_intermediate > 0


def test_union_keeps_the_numbers_of_the_first_and_adds_words_before_special_tokens(
    tmp_path: Path, models: dict[str, State]
) -> None:
    merge(tmp_path, linear(*models, tokenizer_source="union"))
    found = numbers(tmp_path / "merged")
    before = numbers(tmp_path / "base")
    assert {token: found[token] for token in before} == before
    assert found.keys() - before.keys() == {"x", "y", "<|end|>"}
    assert [found["x"], found["y"], found["<|end|>"]] == [11, 12, 13]


def test_merged_model_and_tokenizer_load_and_fit_each_other(
    tmp_path: Path, models: dict[str, State]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merge(tmp_path, linear(*models, tokenizer_source="union"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = "a h y x <|end|> </s>"
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(tokens[0], clean_up_tokenization_spaces=False) == text
    assert tokenizer.convert_tokens_to_ids("<|end|>") == 13
    assert 13 in tokenizer.added_tokens_decoder
    assert tokenizer.added_tokens_decoder[13].special
    assert tokenizer.eos_token == "</s>"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.vocab_size == len(tokenizer) == 14
    assert model(tokens).logits.shape == (1, 6, 14)


def test_tokenizer_of_a_model_brings_its_special_numbers(
    tmp_path: Path, models: dict[str, State]
) -> None:
    (tmp_path / "base/generation_config.json").write_text('{"eos_token_id": 10}')
    (tmp_path / "code/generation_config.json").write_text('{"eos_token_id": 8}')
    merge(tmp_path, linear(*models, tokenizer_source="@code"))
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert (config["eos_token_id"], config["vocab_size"]) == (8, 9)
    generation = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert generation == {"eos_token_id": 8}


def test_choices_for_single_tokens_hold_where_a_token_is_missing_or_everywhere_if_forced(
    tmp_path: Path, models: dict[str, State]
) -> None:
    tokens = {
        "x": {"source": {"kind": "zero"}},
        "y": {"source": "@code", "force": True},
        "h": {"source": {"kind": "model_token", "model": "@code", "token": "a"}},
        "g": {"source": {"kind": "model_token", "model": "@chat", "token_id": 15}, "force": True},
        "new": {"source": {"kind": "zero"}, "force": True},
    }
    tokenizer = {"source": "union", "tokens": tokens}
    _, merged = merge(tmp_path, linear(*models, tokenizer=tokenizer))
    own = {name: rows(tmp_path / name, state, HEAD) for name, state in models.items()}
    found = {token: merged[HEAD][n] for token, n in numbers(tmp_path / "merged").items()}
    assert torch.equal(found["x"], 2 * own["chat"]["x"] + 4 * own["code"]["x"])
    torch.testing.assert_close(found["y"], 7 * own["code"]["y"])
    assert torch.equal(found["h"], own["base"]["h"] + 2 * own["chat"]["h"] + 4 * own["code"]["a"])
    torch.testing.assert_close(found["g"], 7 * models["chat"][HEAD][15])
    assert torch.equal(found["new"], torch.zeros(16))


def test_padding_rows_are_the_mean_of_all_others(tmp_path: Path, models: dict[str, State]) -> None:
    tokenizer = {"source": "base", "pad_to_multiple_of": 8}
    _, merged = merge(tmp_path, linear("base", tokenizer=tokenizer))
    assert merged[EMBEDDING].shape == (16, 16)
    assert torch.equal(merged[EMBEDDING][:11], models["base"][EMBEDDING])
    mean = models["base"][EMBEDDING].double().mean(0).float()
    torch.testing.assert_close(merged[EMBEDDING][11:], mean.expand(5, 16), rtol=1e-6, atol=1e-7)


def test_rows_beyond_the_vocabulary_are_cut_off_where_models_have_different_numbers_of_them(
    tmp_path: Path,
) -> None:
    first = write_model(tmp_path / "a", BASE, seed=1, rows=12)
    second = write_model(tmp_path / "b", BASE, seed=2, rows=16)
    plan, merged = merge(tmp_path, linear("a", "b", tokenizer_source="union"))
    assert torch.equal(merged[HEAD], first[HEAD][:10] + 2 * second[HEAD][:10])
    assert plan.totals.bytes_intermediate == 0
    assert not any(setting.method == ALIGN for setting in plan.settings)


def test_blocks_of_rows_give_the_same_bytes_within_a_small_budget(tmp_path: Path) -> None:
    words = [f"w{n}" for n in range(5000)]
    for number, order in enumerate((words, words[::-1][:4000], words[1::2] + words[::4])):
        unique = list(dict.fromkeys(["<unk>", *order]))
        write_model(tmp_path / f"m{number}", unique, seed=number)
    recipe = linear("m0", "m1", "m2", tokenizer={"source": "union", "pad_to_multiple_of": 7})
    plan, whole = merge(tmp_path, recipe, overwrite=True)
    budget = 1 << 21
    small, cut = merge(tmp_path, recipe, overwrite=True, memory_budget=budget)
    aligned = [p for s in small.shards if not s.is_output for p in s.problems]
    assert {problem.row_block for problem in aligned} == {
        3264,
        4096,
    }  # of means of two, and of copies
    assert all(problem.host_bytes <= budget for problem in aligned)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert all(p.row_block == 0 for s in plan.shards if not s.is_output for p in s.problems)


def test_workers_read_what_the_plan_counts_and_rows_that_nobody_needs_are_not_read(
    tmp_path: Path, models: dict[str, State]
) -> None:
    plan, _ = merge(tmp_path, linear(*models, tokenizer_source="base"))
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    assert report["bytes_read"] == plan.totals.bytes_read
    aligned = [p for s in plan.shards if not s.is_output for p in s.problems]
    copied, meant = 11, 6 + 2 * 5
    assert {p.bytes_read for p in aligned} == {64 * copied, 64 * meant}


def test_task_vectors_are_those_of_aligned_models(tmp_path: Path, models: dict[str, State]) -> None:
    recipe = linear("chat", base_model="@base", merge_method="task_arithmetic")
    del recipe["parameters"]
    _, merged = merge(tmp_path, {**recipe, "tokenizer_source": "base"})
    chat, base = (rows(tmp_path / name, models[name], HEAD) for name in ("chat", "base"))
    for token, number in numbers(tmp_path / "base").items():
        row = base[token] + (chat.get(token, base[token]) - base[token])
        torch.testing.assert_close(merged[HEAD][number], row)


@pytest.mark.parametrize(
    ("token", "source", "pointer", "text"),
    [
        ("y", "@base", "/tokenizer/tokens/y/source", "no embedding of the token 'y'"),
        ("a/b", "@chat", "/tokenizer/tokens/a~1b/source", "no embedding of the token 'a/b'"),
        (
            "y",
            {"kind": "model_token", "model": "@base", "token_id": 99},
            "/tokenizer/tokens/y/source",
            "11 rows, and none numbered 99",
        ),
        ("y", "@other", "/tokenizer/tokens/y/source", "none of the models"),
    ],
)
def test_choices_that_cannot_be_followed_are_refused_by_field(
    tmp_path: Path, models: dict[str, State], token: str, source: Any, pointer: str, text: str
) -> None:
    tokenizer = {"source": "union", "tokens": {token: {"source": source}}}
    with pytest.raises(RecipeError) as caught:
        merge(tmp_path, linear(*models, tokenizer=tokenizer))
    assert [fault.pointer for fault in caught.value.faults] == [pointer]
    assert text in caught.value.faults[0].detail


def test_sentencepiece_alone_is_refused_with_the_way_to_convert_it(
    tmp_path: Path, models: dict[str, State]
) -> None:
    (tmp_path / "code/tokenizer.json").rename(tmp_path / "code/tokenizer.model")
    with pytest.raises(RecipeError, match=r"tokenizer\.model alone.*save_pretrained") as caught:
        merge(tmp_path, linear(*models, tokenizer_source="union"))
    assert caught.value.faults[0].pointer == "/tokenizer_source"


def test_token_that_no_model_has_is_zero_with_a_warning(
    tmp_path: Path, models: dict[str, State]
) -> None:
    write_model(tmp_path / "other", [*BASE, "nobody"], seed=9)
    plan, merged = merge(tmp_path, linear("base", "chat", tokenizer_source="@other"))
    assert torch.equal(merged[HEAD][10], torch.zeros(16))
    assert any("'nobody'" in warning and "zeros" in warning for warning in plan.warnings)


def test_slices_align_the_models_that_give_their_ends(
    tmp_path: Path, models: dict[str, State]
) -> None:
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "@base", "layer_range": [0, 1]}]},
            {"sources": [{"model": "@code", "layer_range": [0, 2]}]},
        ],
        "tokenizer_source": "union",
    }
    _, merged = merge(tmp_path, recipe)
    found = numbers(tmp_path / "merged")
    base, code = (
        rows(tmp_path / n, models[n], t) for n, t in (("base", EMBEDDING), ("code", HEAD))
    )
    for token, number in found.items():
        zeros = torch.zeros(16)
        assert torch.equal(merged[EMBEDDING][number], base.get(token, zeros))
        assert torch.equal(merged[HEAD][number], code.get(token, zeros))


def test_adapters_on_a_model_start_from_its_rows_in_the_new_order(
    tmp_path: Path, models: dict[str, State]
) -> None:
    parts = factors("model.layers.0.mlp.up_proj", 32, 16, 2, torch.Generator().manual_seed(0))
    write_adapter(tmp_path / "adapter", parts, r=2, target_modules=["up_proj"])
    recipe = linear("chat+@adapter", "code", tokenizer_source="union")
    _, merged = merge(tmp_path, recipe)
    plain, without = tmp_path / "plain", linear("chat", "code", tokenizer_source="union")
    plain.mkdir()
    for name in ("chat", "code"):
        (plain / name).symlink_to(tmp_path / name)
    _, expected = merge(plain, without)
    changed = {name for name in merged if not torch.equal(merged[name], expected[name])}
    assert changed == {"model.layers.0.mlp.up_proj.weight"}


def write_adapters(folder: Path) -> None:
    """One on the rows of chat's head and embedding, and one that replaces the embedding."""
    generator = torch.Generator().manual_seed(0)
    parts = factors("lm_head", 16, 16, 2, generator)
    prefix = "base_model.model.model.embed_tokens"
    parts |= {
        f"{prefix}.lora_embedding_A": torch.randn(3, 16, generator=generator),
        f"{prefix}.lora_embedding_B": torch.randn(16, 3, generator=generator),
    }
    ranks = {"r": 2, "lora_alpha": 4, "rank_pattern": {"embed_tokens": 3}}
    write_adapter(folder / "lora", parts, target_modules=["lm_head", "embed_tokens"], **ranks)
    saved = {f"{prefix}.weight": torch.randn(16, 16, generator=generator)}
    saved |= factors("model.layers.0.mlp.up_proj", 32, 16, 2, generator)
    config = {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens"]}
    write_adapter(folder / "saved", saved, r=2, **config)


def as_checkpoints(folder: Path, *names: str) -> None:
    """The experts that the adapters make of chat, as whole models."""
    for name in names:
        one = {"merge_method": "linear", "models": [{"model": f"{folder}/chat+{folder}/{name}"}]}
        storage, output = open_storage(), str(folder / f"chat-{name}")
        run_plan(make_plan(parse_recipe(one), storage, MergeOptions(), output), storage)


@pytest.mark.parametrize(
    "names",
    [
        ("code", "chat+@lora"),
        ("chat+@saved", "code"),
        ("chat+@lora", "chat", "code"),
        ("base", "chat+@saved", "chat+@lora"),
    ],
)
@pytest.mark.parametrize(
    "changes",
    [{}, *({"merge_method": "task_arithmetic", "base_model": f"@{n}"} for n in ("base", "chat"))],
)
def test_rows_that_adapters_change_are_moved_like_those_of_whole_models(
    tmp_path: Path, models: dict[str, State], names: tuple[str, ...], changes: dict[str, Any]
) -> None:
    write_adapters(tmp_path)
    as_checkpoints(tmp_path, "lora", "saved")
    changes = {"tokenizer_source": "union", **changes}
    whole = [name.replace("+@", "-") for name in names]
    _, expected = merge(tmp_path, linear(*whole, **changes))
    plan, merged = merge(tmp_path, linear(*names, **changes), overwrite=True)
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    assert report["bytes_read"] == plan.totals.bytes_read
    for name, tensor in expected.items():
        exact = name in (EMBEDDING, HEAD)
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=0 if exact else 1e-6)


def test_adapters_of_rows_that_stay_in_place_are_not_expanded(
    tmp_path: Path, models: dict[str, State]
) -> None:
    parts = factors("lm_head", 11, 16, 2, torch.Generator().manual_seed(0))
    write_adapter(tmp_path / "adapter", parts, r=2, target_modules=["lm_head"])
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "@base",
        "models": [{"model": "@adapter"}, {"model": "@code"}],
        "tokenizer_source": "base",
    }
    plan, _ = merge(tmp_path, recipe)
    moved = [shard for shard in plan.shards if not shard.is_output]
    assert [shard.file_name.split("-")[0] for shard in moved] == ["vocabulary"]
    [head] = [p for shard in plan.outputs for p in shard.problems if p.tensor_name == HEAD]
    assert [part.rank for part in head.parts] == [2, 0]


def test_expanded_rows_fit_a_small_budget_and_serve_all_variants(
    tmp_path: Path, models: dict[str, State]
) -> None:
    write_adapters(tmp_path)
    recipe = linear("code", "chat+@lora", tokenizer_source="union")
    sweep = [{"name": "half", "parameters": {"weight": 0.5}}, {"name": "one"}]
    recipe["models"] = [{"model": entry["model"]} for entry in recipe["models"]]
    merge(tmp_path, {**recipe, "sweep": sweep}, memory_budget=1 << 20)
    for name, weight in (("half", 0.5), ("one", 1.0)):
        single = {**recipe, "parameters": {"normalize": False, "weight": weight}}
        _, alone = merge(tmp_path, single, overwrite=True)
        swept = load_merged(tmp_path / "merged" / name)
        assert all(torch.equal(swept[key], tensor) for key, tensor in alone.items())
