"""What planning a calibrated merge finds out from headers, configs and samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from merging.errors import MergeError, RecipeError
from merging.options import MergeOptions
from merging.plan.architectures import known_architectures
from merging.plan.planner import make_plan
from merging.plan.samples import parse_lines
from merging.recipe import parse_recipe
from merging.recipe.calibration import CalibrationSettings
from merging.storage.router import open_storage
from tests.support.adapters import make_adapters
from tests.support.calibrated import calibrated_recipe
from tests.support.checkpoints import Family, make_family

ROOT = Path(__file__).parents[3]


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(tmp_path / "models", num_experts=2)


def plan(document: dict[str, Any], tmp_path: Path) -> Any:
    return make_plan(parse_recipe(document), open_storage(), MergeOptions(), str(tmp_path / "out"))


def document_of(family: Family, **calibration: Any) -> dict[str, Any]:
    return calibrated_recipe([family.base, *family.experts], **calibration)


def test_slices_are_refused(family: Family, tmp_path: Path) -> None:
    document = document_of(family)
    sources = [{**entry, "layer_range": [0, 2]} for entry in document.pop("models")]
    document["slices"] = [{"sources": sources}]
    with pytest.raises(RecipeError, match="runs whole models on samples"):
        plan(document, tmp_path)


def test_equal_recipes_and_samples_give_equal_plans(family: Family, tmp_path: Path) -> None:
    first = plan(document_of(family), tmp_path)
    assert plan(document_of(family), tmp_path).to_json() == first.to_json()
    other = plan(document_of(family, data=[[1, 2]]), tmp_path)
    assert other.digest != first.digest
    assert len(first.shards) == 2 * 3 + 1
    assert first.totals.bytes_intermediate > 0


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architectures": ["OurOwnForCausalLM"], "auto_map": {"AutoModel": "x.py--Y"}},
            "cannot build without remote code",
        ),
        ({"architectures": None}, "has the architecture 'none'"),
        ({"is_encoder_decoder": True}, "has an encoder and a decoder"),
        ({"hidden_size": None}, "has none of hidden_size"),
    ],
)
def test_a_model_that_cannot_be_run_is_refused_with_the_reason(
    family: Family, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    change_config(family.experts[1], **changes)
    with pytest.raises(RecipeError, match=words) as raised:
        plan(document_of(family), tmp_path)
    assert [fault.pointer for fault in raised.value.faults] == ["/models/1/model"]


def test_adapters_are_refused(tmp_path: Path) -> None:
    made = make_adapters(tmp_path / "models", (4,), whole=False)
    with pytest.raises(RecipeError, match="is merged as an adapter"):
        plan(calibrated_recipe([made.base, *made.adapters]), tmp_path)


def test_planning_says_what_to_install(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merging.plan.runnable.known_architectures", lambda: None)
    with pytest.raises(RecipeError, match=r"mergeyard\[calibration\]"):
        plan(document_of(family), tmp_path)


def test_variants_that_look_at_other_things_are_refused(family: Family, tmp_path: Path) -> None:
    document = document_of(family)
    document["sweep"] = [
        {"name": "a", "parameters": {"scale": 1.0}},
        {"name": "b", "merge_method": "task_arithmetic"},
    ]
    with pytest.raises(RecipeError, match="task_arithmetic looks at no samples"):
        plan(document, tmp_path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 3 is not JSON"),
        ("[1]", "line 3 is not a JSON object"),
        ('{"txt": "x"}', "line 3 has no field 'text' (it has 'txt')"),
        ('{"text": "  "}', "line 3 is empty"),
        ('{"text": []}', "line 3 is empty"),
        ('{"text": 7}', "line 3 is neither a text nor a list"),
        ('{"text": [1, "a"]}', "line 3 is a list of something else"),
        ('{"text": [1, 2, 3, 4, 5]}', "line 3 has 5 tokens; max_length is 4"),
        ('{"text": [1, 64]}', "line 3 has the token id 64, outside of the model's 64"),
        ('{"text": [-1]}', "line 3 has the token id -1"),
    ],
)
def test_a_bad_line_is_named_by_its_number(line: str, words: str) -> None:
    data = f'{{"text": "good"}}\n\n{line}\n{{"text": [1, 2]}}\n'.encode()
    settings = CalibrationSettings(data="s3://b/x.jsonl", max_length=4)
    with pytest.raises(RecipeError) as raised:
        parse_lines(data, settings, "s3://b/x.jsonl", vocab_size=64)
    [fault] = raised.value.faults
    assert f"s3://b/x.jsonl, {words}" in fault.detail


def test_lines_that_are_not_used_are_not_looked_at() -> None:
    settings = CalibrationSettings(data="x", samples=2)
    assert parse_lines(b'{"text": "a"}\n{"text": [1]}\nnonsense', settings, "x") == ("a", [1])


def test_an_empty_file_is_refused(family: Family, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n\n")
    with pytest.raises(RecipeError, match="holds no samples"):
        plan(document_of(family, data=str(tmp_path / "none.jsonl")), tmp_path)


def test_a_missing_file_is_an_error_of_storage(family: Family, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"none\.jsonl") as caught:
        plan(document_of(family, data=str(tmp_path / "none.jsonl")), tmp_path)
    assert [fault.pointer for fault in caught.value.faults] == ["/calibration"]


def test_texts_need_a_tokenizer(family: Family, tmp_path: Path) -> None:
    for file in family.experts[0].glob("*"):
        if "token" in file.name or "vocab" in file.name:
            file.unlink()
    with pytest.raises(RecipeError, match="has no tokenizer"):
        plan(document_of(family, data=["a text"]), tmp_path)


def test_fewer_samples_than_asked_for_are_a_warning(family: Family, tmp_path: Path) -> None:
    warnings = plan(document_of(family, samples=9), tmp_path).warnings
    assert [w for w in warnings if "5 samples, of 9 that are asked for" in w]


def test_architectures_are_known_without_torch() -> None:
    program = """
import sys
from merging.plan.architectures import known_architectures
from merging.plan import planner
assert {"LlamaForCausalLM", "BertModel", "GPT2LMHeadModel"} <= known_architectures()
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    assert "OurOwnForCausalLM" not in (known_architectures() or ())
