"""Pickled weights are refused wherever a model is named, with a conversion that works."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from merging.checkpoint.adapter import read_model_index
from merging.errors import CheckpointError, MergeError
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.base import Storage
from merging.storage.router import open_storage
from tests.support.adapters import adapter_config
from tests.support.checkpoints import tiny_llama_config, tiny_llama_state
from tests.support.environments import plain_environment
from tests.support.header_checkpoints import llama_tensors, put_checkpoint
from tests.support.memory_storage import MemoryStorage

PICKLE = b"\x80\x04."
MODEL = "mem://models/a"
NAMES = [
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "consolidated.00.pth",
    "model.pt",
    "last.ckpt",
    "weights.pkl",
]


def refused(storage: Storage, uri: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_model_index(storage, uri)
    assert caught.value.code == "unsafe_format"
    return caught.value


@pytest.mark.parametrize("name", NAMES)
def test_folders_of_pickles_are_refused_with_the_way_to_convert_them(name: str) -> None:
    storage = MemoryStorage()
    storage.write_bytes(f"{MODEL}/{name}", PICKLE)
    storage.write_bytes(f"{MODEL}/config.json", b"{}")
    error = refused(storage, MODEL)
    assert name in error.detail
    is_model = name.startswith("pytorch_model")
    assert ("safe_serialization=True" if is_model else "weights_only=True") in error.detail


@pytest.mark.parametrize("name", NAMES)
def test_file_of_pickles_named_by_itself_is_refused(name: str) -> None:
    storage = MemoryStorage()
    storage.write_bytes(f"{MODEL}/{name}", PICKLE)
    assert name in refused(storage, f"{MODEL}/{name}").detail


def test_index_that_points_at_pickles_is_refused() -> None:
    storage = MemoryStorage()
    document = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    storage.write_bytes(f"{MODEL}/model.safetensors.index.json", json.dumps(document).encode())
    storage.write_bytes(f"{MODEL}/pytorch_model-00001-of-00001.bin", PICKLE)
    assert "pytorch_model-00001-of-00001.bin" in refused(storage, MODEL).detail


def test_pickled_adapter_is_refused() -> None:
    storage = MemoryStorage()
    storage.write_bytes(f"{MODEL}/adapter_model.bin", PICKLE)
    storage.write_bytes(f"{MODEL}/adapter_config.json", json.dumps(adapter_config()).encode())
    error = refused(storage, MODEL)
    assert "adapter_model.safetensors" in error.detail


def test_names_that_a_shell_would_read_are_no_part_of_the_command() -> None:
    storage = MemoryStorage()
    storage.write_bytes(f"{MODEL}/$(rm x).pt", PICKLE)
    detail = refused(storage, MODEL).detail
    assert "$(rm" not in detail.partition("python -c")[2]


@pytest.mark.parametrize("place", ["expert", "base", "adapter", "slice", "module"])
def test_planning_refuses_pickles_by_the_place_that_names_them(place: str) -> None:
    storage = MemoryStorage()
    good, bad = "mem://models/good", "mem://models/bad"
    put_checkpoint(storage, good, llama_tensors())
    storage.write_bytes(f"{bad}/{'adapter_model.bin' if place == 'adapter' else 'x.ckpt'}", PICKLE)
    source = {"model": bad, "layer_range": [0, 2]}
    recipe, pointer = {
        "expert": ({"models": [{"model": good}, {"model": bad}]}, "/models/1/model"),
        "base": (
            {"merge_method": "ties", "base_model": bad, "models": [{"model": good}]},
            "/base_model",
        ),
        "adapter": ({"models": [{"model": f"{good}+{bad}"}]}, "/models/0/model"),
        "slice": ({"slices": [{"sources": [source]}]}, "/slices/0/sources/0/model"),
        "module": (
            {"modules": {"default": {"models": [{"model": bad}]}}},
            "/modules/default/models/0/model",
        ),
    }[place]
    parsed = parse_recipe({"merge_method": "linear", **recipe})
    with pytest.raises(MergeError) as caught:
        make_plan(parsed, storage, MergeOptions(), "mem://out")
    assert [(f.pointer, f.code) for f in caught.value.faults] == [(pointer, "unsafe_format")]


@pytest.mark.s3
def test_pickles_on_s3_are_refused(s3_env: object, bucket: str) -> None:
    storage, s3_folder = open_storage(), f"s3://{bucket}/model"
    storage.write_bytes(f"{s3_folder}/pytorch_model.bin", PICKLE)
    assert "pytorch_model.bin" in refused(storage, s3_folder).detail
    assert refused(storage, f"{s3_folder}/pytorch_model.bin")


def convert(detail: str, folder: Path) -> None:
    """Run the command of a refusal, as a user would."""
    python, *command = shlex.split(detail[detail.index("python -c") :])
    assert python == "python"
    subprocess.run([sys.executable, *command], cwd=folder, env=plain_environment(), check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.pt", "adapter_model.bin"])
def test_converted_files_hold_the_same_tensors(tmp_path: Path, name: str) -> None:
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    torch.save(state, tmp_path / name)
    convert(refused(open_storage(), str(tmp_path)).detail, tmp_path)
    target = "adapter_model.safetensors" if "adapter" in name else "model.safetensors"
    found = load_file(tmp_path / target)
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())


@pytest.mark.slow
def test_converted_model_is_read(tmp_path: Path) -> None:
    state = tiny_llama_state(hidden=16)
    old = tmp_path / "OLD"
    old.mkdir()
    torch.save(state, old / "pytorch_model.bin")
    (old / "config.json").write_text(json.dumps(tiny_llama_config(hidden=16)))
    convert(refused(open_storage(), str(old)).detail, tmp_path)
    found = load_file(tmp_path / "NEW/model.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
