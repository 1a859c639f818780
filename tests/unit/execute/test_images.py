"""Vision models are run on images as their processors make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.errors import MergeError, RecipeError
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.calibrated import (
    calibrated_recipe,
    images,
    statistics_shards,
    write_images,
    write_models,
)
from tests.support.merges import load_merged, weight_bytes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_models(tmp_path_factory.mktemp("models"), "clip_vision", 2)


def plan_of(models: list[Path], output: Path, **calibration: Any) -> Plan:
    recipe = parse_recipe(calibrated_recipe(models, **calibration))
    return make_plan(recipe, open_storage(), MergeOptions(), str(output))


def test_only_the_images_that_are_used_are_read(models: list[Path], tmp_path: Path) -> None:
    data = write_images(tmp_path / "images.safetensors")
    plan = plan_of(models, tmp_path / "out", data=data, samples=4)
    first = statistics_shards(plan)[0]
    [source] = [s for s in first.problems[0].given if plan.files[s.file].uri == data]
    assert source.num_bytes == 4 * 3 * 16 * 16 * 4
    report = run_plan(plan, open_storage())
    assert report["bytes_read"] == plan.totals.bytes_read
    rows = {tensor["name"]: tensor.get("rows") for tensor in report["tensors"]}
    assert rows["encoder.layers.1.mlp.fc1.weight"] == [4 * 17] * 2
    assert rows["pre_layrnorm.weight"] == [4 * 17] * 2
    assert rows["post_layernorm.weight"] == [4, 4]
    assert rows["embeddings.patch_embedding.weight"] is None


def test_images_may_be_half_precision_and_under_another_name(
    models: list[Path], tmp_path: Path
) -> None:
    half = images().half()
    one = write_images(tmp_path / "one.safetensors", pixel_values=half.float())
    other = write_images(tmp_path / "other.safetensors", pixels=half)
    run_plan(plan_of(models, tmp_path / "a", data=one), open_storage())
    run_plan(plan_of(models, tmp_path / "b", data=other, field="pixels"), open_storage())
    assert weight_bytes(tmp_path / "a") == weight_bytes(tmp_path / "b")


def test_names_of_older_checkpoints_are_understood(models: list[Path], tmp_path: Path) -> None:
    """Those that transformers itself still reads."""
    data = write_images(tmp_path / "images.safetensors")
    older = [tmp_path / "older" / model.name for model in models]
    for path, model in zip(older, models, strict=True):
        path.mkdir(parents=True)
        (path / "config.json").write_bytes((model / "config.json").read_bytes())
        tensors = load_file(model / "model.safetensors")
        renamed = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
        save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    run_plan(plan_of(models, tmp_path / "a", data=data), open_storage())
    run_plan(plan_of(older, tmp_path / "b", data=data), open_storage())
    found = load_merged(tmp_path / "b")
    for name, tensor in load_merged(tmp_path / "a").items():
        torch.testing.assert_close(found[f"vision_model.{name}"], tensor)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"pixel_values": torch.zeros(3, 3, 16, 8)}, r"sees images × 3 × 16 × 16"),
        ({"pixel_values": torch.zeros(3, 16, 16)}, r"is F32 \[3, 16, 16\]"),
        ({"pixel_values": torch.zeros(3, 3, 16, 16, dtype=torch.uint8)}, "in one of BF16"),
        ({"pixel_values": torch.zeros(0, 3, 16, 16)}, "holds no images"),
    ],
)
def test_what_the_model_does_not_see_is_refused_at_planning(
    models: list[Path], tmp_path: Path, tensors: dict[str, torch.Tensor], words: str
) -> None:
    data = write_images(tmp_path / "images.safetensors", **tensors)
    with pytest.raises(RecipeError, match=words) as raised:
        plan_of(models, tmp_path / "out", data=data)
    assert [fault.pointer for fault in raised.value.faults] == ["/calibration"]


def test_other_data_are_refused(models: list[Path], tmp_path: Path) -> None:
    for data in ([[1, 2]], ["a text"], str(tmp_path / "some.jsonl")):
        with pytest.raises(RecipeError, match="is run on images: 'data' names"):
            plan_of(models, tmp_path / "out", data=data)
    data = write_images(tmp_path / "images.safetensors")
    with pytest.raises(RecipeError, match=r"has no tensor 'pixels' \(it has labels, "):
        plan_of(models, tmp_path / "out", data=data, field="pixels")
    (tmp_path / "none.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(MergeError, match=r"none\.safetensors"):
        plan_of(models, tmp_path / "out", data=str(tmp_path / "none.safetensors"))


def test_models_of_texts_are_run_on_no_images(tmp_path: Path) -> None:
    data = write_images(tmp_path / "images.safetensors")
    with pytest.raises(RecipeError, match="only models that see images"):
        plan_of(write_models(tmp_path, "bert", 1), tmp_path / "out", data=data)


def test_an_image_that_is_not_finite_is_named(models: list[Path], tmp_path: Path) -> None:
    broken = images()
    broken[2, 1, 0, 0] = torch.nan
    data = write_images(tmp_path / "images.safetensors", pixel_values=broken)
    with pytest.raises(RecipeError, match=r"Image 3 of .* holds NaN"):
        run_plan(plan_of(models, tmp_path / "out", data=data), open_storage())
