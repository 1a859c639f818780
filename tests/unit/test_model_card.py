"""Model cards as the Hub reads them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from merging.local_run import run_plan
from merging.method import get_method
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.report import CARD_NAME, hub_name
from merging.storage.router import open_storage
from tests.support.checkpoints import Family, make_family
from tests.support.merges import plan_merge, recipe

CACHE = "models--{}/snapshots/0123abcd"


def read_card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / CARD_NAME)


def merge(family: Family, output: Path, method: str = "linear") -> ModelCardData:
    storage = open_storage()
    run_plan(plan_merge(family, method, storage, output), storage)
    return read_card(output).data


def test_models_of_the_hub_are_shown_as_parents_of_the_merge(tmp_path: Path) -> None:
    made = make_family(tmp_path / "models", num_experts=2)
    names = ("org/base-7B", "org/chat.v1", "gpt2")
    places = [tmp_path / "hub" / CACHE.format(name.replace("/", "--")) for name in names]
    for source, place in zip((made.base, *made.experts), places, strict=True):
        place.parent.mkdir(parents=True)
        source.rename(place)
    moved = dataclasses.replace(made, base=places[0], experts=tuple(places[1:]))
    data = merge(moved, tmp_path / "out", "task_arithmetic")
    assert data.base_model == list(names)
    for name in data.base_model:
        validate_repo_id(name)
    assert data["base_model_relation"] == "merge"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["merge", "mergeyard", "task_arithmetic"]


def test_the_card_of_several_documents_names_the_methods_of_all_steps(tmp_path: Path) -> None:
    family = make_family(tmp_path / "models", num_experts=2)
    storage = open_storage()
    first = {**recipe(family, "ties"), "name": "first"}
    last = {"merge_method": "linear", "models": [{"model": "first"}]}
    documents = parse_recipe({"documents": [first, last]})
    run_plan(make_plan(documents, storage, MergeOptions(), str(tmp_path / "out")), storage)
    card = read_card(tmp_path / "out")
    assert card.data.tags == ["merge", "mergeyard", "ties", "linear"]
    titles = [get_method(name).title for name in ("ties", "linear")]
    assert f"by **{titles[0]}**, then **{titles[1]}**, made" in card.text


def test_other_models_stand_in_the_text_only(tmp_path: Path) -> None:
    family = make_family(tmp_path / "models", num_experts=2)
    data = merge(family, tmp_path / "out")
    assert data.base_model is None
    assert "base_model_relation" not in data.to_dict()
    text = read_card(tmp_path / "out").text
    assert all(str(expert) in text for expert in family.experts)


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("/root/.cache/huggingface/hub/models--org--name/snapshots/abc", "org/name"),
        ("/cache/models--org--name-with.dots_1/snapshots/main/", "org/name-with.dots_1"),
        ("s3://bucket/hub/models--gpt2/snapshots/abc", "gpt2"),
        ("/models/chat", None),
        ("org/name", None),
        ("s3://bucket/models--org--name", None),
        ("/cache/datasets--org--name/snapshots/abc", None),
    ],
)
def test_only_snapshots_of_the_hub_have_its_names(uri: str, name: str | None) -> None:
    assert hub_name(uri) == name
