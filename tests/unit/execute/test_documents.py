"""Recipes of several documents that refer to each other, merged as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from merging.errors import Cancelled, MergeError, RecipeError
from merging.execute.shard import run_shard
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.plan.stages import shards_left
from merging.recipe import parse_recipe
from merging.recipe.document import load_document
from merging.storage.router import open_storage
from tests.support.adapters import factors, write_adapter
from tests.support.checkpoints import Family, make_family
from tests.support.merges import load_merged, weight_bytes
from tests.support.tokenizers import write_model


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(tmp_path / "models", 3, shards=2)


def linear(*models: str | Path, **changes: Any) -> dict[str, Any]:
    """Of models with weights 1, 2, 4."""
    entries = [
        {"model": str(model), "parameters": {"weight": 2**number}}
        for number, model in enumerate(models)
    ]
    return {"merge_method": "linear", "models": entries, **changes}


def plan(output: Path, *documents: dict[str, Any], **options: Any) -> Plan:
    text = "\n---\n".join(yaml.safe_dump(document) for document in documents)
    recipe = parse_recipe(text)
    assert parse_recipe(recipe.normalised()) == recipe
    return make_plan(recipe, open_storage(), MergeOptions(**options), str(output))


def merge(output: Path, *documents: dict[str, Any], **options: Any) -> Plan:
    found = plan(output, *documents, **options)
    assert Plan.from_json(found.to_json()) == found
    run_plan(found, open_storage())
    return found


def run_one(recipe: dict[str, Any], output: Path) -> None:
    storage = open_storage()
    run_plan(make_plan(parse_recipe(recipe), storage, MergeOptions(), str(output)), storage)


def apart(output: Path, *documents: dict[str, Any]) -> None:
    """The same merges one after the other, each a checkpoint of its own."""
    for document in documents:
        folder = output / document.get("name", "last")
        entries = [
            {**e, "model": str(output / e["model"]) if "/" not in e["model"] else e["model"]}
            for e in document["models"]
        ]
        base = document.get("base_model")
        own = {**document, "models": entries}
        if base and "/" not in str(base):
            own["base_model"] = str(output / base)
        run_one(own, folder)


def test_documents_give_the_bytes_of_merges_one_after_the_other(
    tmp_path: Path, family: Family
) -> None:
    a, b, c = family.experts
    first = linear(a, b, name="first")
    second = {
        "name": "second",
        "merge_method": "ties",
        "base_model": str(family.base),
        "models": [{"model": "first"}, {"model": str(c)}],
        "parameters": {"density": 0.5, "scope": "global"},
    }
    last = {
        "merge_method": "task_arithmetic",
        "base_model": "first",
        "models": [{"model": "second"}, {"model": str(a)}],
    }
    found = merge(tmp_path / "together", last, second, first)
    apart(tmp_path / "apart", first, second, last)
    together = load_merged(tmp_path / "together")
    assert all(
        torch.equal(tensor, together[name])
        for name, tensor in load_merged(tmp_path / "apart/last").items()
    )
    assert {item.uri for item in found.inputs} == {str(m) for m in (family.base, a, b, c)}
    report = json.loads((tmp_path / "together/merge_report.json").read_text())
    assert report["method"] == "task_arithmetic"
    assert report["methods"] == ["linear", "ties", "task_arithmetic"]
    assert found.totals.bytes_intermediate > 2 * sum(shard.size for shard in found.outputs)
    left = sorted(path.name for path in (tmp_path / "together").iterdir())
    assert not any("document" in name or name == ".mergeyard" for name in left)


def test_published_is_the_last_where_all_have_names(tmp_path: Path, family: Family) -> None:
    a, b, c = family.experts
    documents = (linear(a, b, name="x"), linear("x", c, name="y"))
    merge(tmp_path / "out", *documents)
    expected = (
        family.expert_states[0]["lm_head.weight"] + 2 * family.expert_states[1]["lm_head.weight"]
    ) / 3
    expected = (expected + 2 * family.expert_states[2]["lm_head.weight"]) / 3
    torch.testing.assert_close(load_merged(tmp_path / "out")["lm_head.weight"], expected)


def test_documents_that_nobody_needs_are_left_out_with_a_warning(
    tmp_path: Path, family: Family
) -> None:
    a, b, c = family.experts
    found = plan(tmp_path / "out", linear(a, b, name="idle"), linear(b, c))
    assert found.totals.bytes_intermediate == 0
    assert any("'idle' is needed by no other" in warning for warning in found.warnings)


def test_interrupted_merge_goes_on_where_it_stopped(tmp_path: Path, family: Family) -> None:
    a, b, c = family.experts
    documents = (linear(a, b, name="x"), linear("x", c))
    options = {"max_shard_size": 200_000}
    merge(tmp_path / "whole", *documents, **options)
    found = plan(tmp_path / "out", *documents, **options)
    half = len(found.shards) // 2
    done: list[int] = []

    def engine(work: Any, *args: Any, **kwargs: Any) -> Any:
        if len(done) == half and not again:
            raise Cancelled("stop")
        done.append(work.shard.index)
        return run_shard(work, *args, **kwargs)

    again: list[bool] = []
    with pytest.raises(Cancelled):
        run_plan(found, open_storage(), engine=engine)
    again.append(True)
    run_plan(found, open_storage(), engine=engine)
    assert sorted(done) == list(range(len(found.shards)))
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "whole")


def test_adapters_go_on_results_of_other_documents(tmp_path: Path, family: Family) -> None:
    a, b, _ = family.experts
    module = "model.layers.1.mlp.up_proj"
    parts = factors(module, 128, 64, 4, torch.Generator().manual_seed(0))
    write_adapter(tmp_path / "adapter", parts)
    documents = (linear(a, b, name="x"), linear(f"x+{tmp_path / 'adapter'}"))
    found = merge(tmp_path / "out", *documents)
    assert f"document:x+{tmp_path / 'adapter'}" in {item.uri for item in found.inputs}
    apart(tmp_path / "apart", documents[0])
    run_one(linear(f"{tmp_path / 'apart/x'}+{tmp_path / 'adapter'}"), tmp_path / "apart/last")
    together = load_merged(tmp_path / "out")
    for name, tensor in load_merged(tmp_path / "apart/last").items():
        assert torch.equal(tensor, together[name])


def test_vocabularies_grow_from_document_to_document(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    state = {
        name: write_model(tmp_path / name, ["<unk>", *words], ["</s>"], seed=seed)
        for seed, (name, words) in enumerate({"a": "abc", "b": "abd", "c": "xa"}.items())
    }
    models = {name: tmp_path / name for name in state}
    documents = (
        linear(
            models["a"], models["b"], name="ab", tokenizer_source="union", chat_template="chatml"
        ),
        linear("ab", models["c"], tokenizer_source="union"),
    )
    merge(tmp_path / "out", *documents)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == {
        "<unk>": 0, "a": 1, "b": 2, "c": 3, "</s>": 4, "d": 5, "x": 6,
    }  # fmt: skip
    assert "<|im_start|>" in tokenizer.chat_template
    head = load_merged(tmp_path / "out")["lm_head.weight"]
    own = {name: s["lm_head.weight"] for name, s in state.items()}
    d, x = own["b"][3], own["c"][1]
    torch.testing.assert_close(head[5], d)
    torch.testing.assert_close(head[6], x)
    a = (own["a"][1] + 2 * own["b"][1]) / 3
    torch.testing.assert_close(head[1], (a + 2 * own["c"][2]) / 3)


def test_a_tokenizer_is_taken_from_a_document_that_is_not_merged(tmp_path: Path) -> None:
    for seed, (name, words) in enumerate({"a": "abc", "b": "abd"}.items()):
        write_model(tmp_path / name, ["<unk>", *words], ["</s>"], seed=seed)
    models = [tmp_path / "a", tmp_path / "b"]
    documents = (
        linear(models[0], tokenizer_source="both"),
        linear(*models, name="both", tokenizer_source="union"),
    )
    found = merge(tmp_path / "out", *documents)
    assert not any("document" in shard.file_name for shard in found.shards), "read by nothing"
    merge(tmp_path / "apart/both", linear(*models, tokenizer_source="union"))
    merge(
        tmp_path / "apart/last",
        linear(models[0], tokenizer_source=str(tmp_path / "apart/both")),
    )
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "apart/last")
    written = (tmp_path / "out/tokenizer.json").read_text()
    assert written == (tmp_path / "apart/last/tokenizer.json").read_text()


def test_what_is_wrong_is_told_of_the_document(tmp_path: Path, family: Family) -> None:
    a, b, _ = family.experts
    with pytest.raises(MergeError) as caught:
        plan(tmp_path / "out", linear("x", b), linear(a, tmp_path / "none", name="x"))
    assert [fault.pointer for fault in caught.value.faults] == ["/documents/1/models/1/model"]


@pytest.mark.parametrize(
    ("documents", "pointer", "text"),
    [
        ([{"name": "x", "in": ["x"]}], "/documents/0/models/0/model", "circle: x → x"),
        (
            [{"in": ["x"]}, {"name": "x", "in": ["./a", "y"]}, {"name": "y", "in": ["x"]}],
            "/documents/2/models/0/model",
            "circle: x → y → x",
        ),
        (
            [{"in": ["left"]}, {"name": "lefft", "in": ["./a"]}],
            "/documents/0/models/0/model",
            "'lefft'",
        ),
        ([{"in": ["./a"]}, {"in": ["./a"]}], "/documents/1", "no 'name'"),
        (
            [{"name": "x", "in": ["./a"]}, {"name": "x", "in": ["./a"]}],
            "/documents/1/name",
            "stands twice",
        ),
        ([{"name": "a/b", "in": ["./a"]}, {"in": ["./a"]}], "/documents/0/name", "without '/'"),
        ([{"in": ["./a"], "sweep": [{"name": "a"}]}], "/documents/0/sweep", "by itself"),
        ([{"in": [""]}], "/documents/0/models/0/model", "A model is a path"),
        ([3], "/documents/0", "a recipe, not 3"),
        ([], "/documents", "a list of 1 to 50"),
        ([{"in": ["./a"], "name": f"n{i}"} for i in range(51)], "/documents", "not 51"),
        (
            [{"in": ["./a"], "name": "left"}, {"in": ["left"], "tokenizer_source": "lefft"}],
            "/documents/1/tokenizer_source",
            "Did you mean 'left'",
        ),
        (
            [
                {"in": ["./a"], "name": "x", "tokenizer": {"tokens": {"a/b": {"source": "y"}}}},
                {"in": ["x"], "name": "y"},
            ],
            "/documents/0/tokenizer/tokens/a~1b/source",
            "circle: y → x → y",
        ),
    ],
)
def test_malformed_documents_are_refused_by_field(
    documents: list[Any], pointer: str, text: str
) -> None:
    written = [
        linear(*item.pop("in"), **item) if isinstance(item, dict) else item
        for item in [dict(d) if isinstance(d, dict) else d for d in documents]
    ]
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"documents": written})
    found = [fault for fault in caught.value.faults if fault.pointer == pointer]
    assert found, caught.value.faults
    assert text in found[0].detail


def test_the_first_of_many_circles_is_told() -> None:
    """Every document needs the two after it and the first: there are some 10¹⁰ ways around."""
    documents = [linear(f"n{i + 1}", f"n{i + 2}", "n0", name=f"n{i}") for i in range(48)]
    documents += [linear("./a", name="n48"), linear("./a", name="n49")]
    with pytest.raises(RecipeError, match="circle: n0 → ") as caught:
        parse_recipe({"documents": [*documents[1:], documents[0]]})
    assert len(caught.value.faults) == 1


def test_nothing_stands_beside_documents() -> None:
    with pytest.raises(RecipeError, match="nothing beside"):
        parse_recipe({"documents": [linear("./a")], "dtype": "float32"})


def test_several_documents_are_refused_where_one_is_expected() -> None:
    with pytest.raises(
        RecipeError, match=r"several YAML documents \(the second begins at line 2\)"
    ):
        load_document("a: 1\n---\nb: 2", [])


def test_embeddings_that_nothing_reads_are_not_put_in_order(tmp_path: Path) -> None:
    """The base's, where a method of matrices takes the mean of the experts' embeddings."""
    for seed, (name, words) in enumerate({"base": "ab", "one": "bax", "two": "xab"}.items()):
        write_model(tmp_path / name, ["<unk>", *words], ["</s>"], seed=seed)
    one = {
        "merge_method": "wudi",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / name)} for name in ("one", "two")],
        "parameters": {"steps": 1},
        "tokenizer_source": "union",
    }
    found = merge(tmp_path / "out", one)
    early = [shard for shard in found.shards if not shard.is_output]
    assert len(early) == 2
    assert shards_left(found, ()) == {shard.index for shard in found.shards}
    assert found.totals.bytes_read == sum(shard.bytes_read for shard in found.shards)


# -- a base model with an adapter on it


@pytest.fixture
def adapted(family: Family, tmp_path: Path) -> tuple[str, Path]:
    """The base model with an adapter on it, as recipes name it, and as a checkpoint."""
    shape = family.base_state["model.layers.0.mlp.up_proj.weight"].shape
    tensors = factors("model.layers.0.mlp.up_proj", *shape, 4, torch.Generator().manual_seed(5))
    adapter = write_adapter(tmp_path / "adapter", tensors)
    address = f"{family.base}+{adapter}"
    run_one({"merge_method": "passthrough", "models": [{"model": address}]}, tmp_path / "made")
    return address, tmp_path / "made"


def task_arithmetic(base: Any, *models: Any) -> dict[str, Any]:
    entries = [{"model": model if isinstance(model, dict) else str(model)} for model in models]
    return {"merge_method": "task_arithmetic", "base_model": base, "models": entries}


def test_a_base_model_may_have_an_adapter(
    family: Family, adapted: tuple[str, Path], tmp_path: Path
) -> None:
    address, made = adapted
    run_one(task_arithmetic(str(made), *family.experts), tmp_path / "expected")
    found = merge(tmp_path / "found", task_arithmetic(address, address, *family.experts))
    assert weight_bytes(tmp_path / "found") == weight_bytes(tmp_path / "expected")
    assert found.method == "task_arithmetic"
    assert weight_bytes(made) != weight_bytes(family.base)


def test_it_may_be_a_mapping_and_stand_in_slices_too(
    family: Family, adapted: tuple[str, Path], tmp_path: Path
) -> None:
    address, made = adapted
    model, _, adapter = address.partition("+")
    mapping = {"model": {"path": model}, "lora": {"path": adapter}}

    def recipe(base: Any) -> dict[str, Any]:
        sources = [{"model": model, "layer_range": [0, 1]} for model in (base, family.experts[0])]
        sources[1]["model"] = str(sources[1]["model"])
        return {"merge_method": "slerp", "base_model": base, "parameters": {"t": 0.25}} | {
            "slices": [{"sources": sources}]
        }

    run_one(recipe(str(made)), tmp_path / "expected")
    merge(tmp_path / "found", recipe(mapping))
    assert weight_bytes(tmp_path / "found") == weight_bytes(tmp_path / "expected")


def test_what_is_wrong_with_it_is_told_by_its_place(family: Family, tmp_path: Path) -> None:
    recipe = task_arithmetic(f"{family.base}+{tmp_path / 'none'}", *family.experts)
    with pytest.raises(MergeError) as caught:
        plan(tmp_path / "out", recipe)
    assert caught.value.faults[0].pointer.startswith("/base_model")
    with pytest.raises(RecipeError) as refused:
        parse_recipe(recipe | {"sweep": [{"name": "a"}]})
    assert "/base_model" in [fault.pointer for fault in refused.value.faults]
