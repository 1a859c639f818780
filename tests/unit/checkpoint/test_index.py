"""Reading a checkpoint's index: which files count, what must agree, and how faults are told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from merging.checkpoint.header import encode_header
from merging.checkpoint.index import CheckpointIndex, read_checkpoint_index
from merging.errors import CheckpointError, StorageError
from merging.storage.local import LocalStorage
from tests.support.checkpoints import (
    INDEX_NAME,
    make_family,
    raw_file,
    tiny_llama_config,
    tiny_llama_state,
    write_checkpoint,
)
from tests.support.memory_storage import MemoryStorage

FIRST = "model-00001-of-00003.safetensors"
SECOND = "model-00002-of-00003.safetensors"
THIRD = "model-00003-of-00003.safetensors"


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return tiny_llama_state(0, hidden=8, layers=3, vocab=16, dtype=torch.bfloat16)


@pytest.fixture
def folder(tmp_path: Path, state: dict[str, torch.Tensor]) -> Path:
    """Three files and an index."""
    config = tiny_llama_config(hidden=8, layers=3, vocab=16, dtype=torch.bfloat16)
    return write_checkpoint(tmp_path / "model", state, config=config, shards=3, tokenizer=True)


def read(folder: Path) -> CheckpointIndex:
    return read_checkpoint_index(LocalStorage(), str(folder))


def refused(folder: Path, code: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    assert caught.value.code == code
    assert str(folder) in caught.value.detail
    return caught.value


def edit_index(folder: Path, **changes: str | None) -> None:
    """Set files of tensors in the index; None takes a tensor out. Dots are written as __."""
    path = folder / INDEX_NAME
    document = json.loads(path.read_text())
    for key, file_name in changes.items():
        name = key.replace("__", ".")
        if file_name is None:
            del document["weight_map"][name]
        else:
            document["weight_map"][name] = file_name
    path.write_text(json.dumps(document))


def test_indexed_checkpoint_is_read_whole(folder: Path, state: dict[str, torch.Tensor]) -> None:
    index = read(folder)
    assert index.uri == str(folder)
    assert [Path(file.uri).name for file in index.files] == [FIRST, SECOND, THIRD]
    for file in index.files:
        stat = LocalStorage().stat(file.uri)
        assert (file.size, file.version) == (stat.size, stat.version)
    assert index.tensors.keys() == state.keys()
    assert index.config["hidden_size"] == 8
    assert index.metadata == {"format": "pt"}
    assert sorted(index.companions) == [
        "chat_template.jinja",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name, version in index.companions.items():
        assert version == LocalStorage().stat(f"{folder}/{name}").version


def test_ranges_hold_the_bytes_of_their_tensors(
    folder: Path, state: dict[str, torch.Tensor]
) -> None:
    index = read(folder)
    for name, entry in index.tensors.items():
        content = Path(index.files[entry.file].uri).read_bytes()[entry.start : entry.end]
        assert entry.name == name
        assert entry.dtype == "BF16"
        assert entry.shape == tuple(state[name].shape)
        assert content == state[name].view(torch.uint8).numpy().tobytes()


def test_tensors_come_in_file_order_and_then_in_offset_order(folder: Path) -> None:
    entries = list(read(folder).tensors.values())
    places = [(entry.file, entry.start) for entry in entries]
    assert places == sorted(places)
    with safe_open(folder / SECOND, "pt") as file:
        in_second = {entry.name for entry in entries if entry.file == 1}
        assert in_second == set(file.keys())


def test_two_readings_are_equal(folder: Path) -> None:
    first, second = read(folder), read(folder)
    assert first == second
    assert list(first.tensors) == list(second.tensors)


def test_single_file_needs_neither_index_nor_config(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    index = read(write_checkpoint(tmp_path / "model", state))
    assert index.config == {}
    assert index.companions == {}
    assert index.tensors.keys() == state.keys()


def test_several_files_without_index_are_read_together(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    index = read(write_checkpoint(tmp_path / "model", state, shards=3, index=False))
    assert len(index.files) == 3
    assert index.tensors.keys() == state.keys()


def test_whole_model_counts_before_other_files_when_there_is_no_index(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    folder = write_checkpoint(tmp_path / "model", state)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert [Path(file.uri).name for file in read(folder).files] == ["model.safetensors"]


def test_files_that_are_not_the_model_are_left_out(folder: Path) -> None:
    before = read(folder)
    (folder / "checkpoint-500").mkdir()
    shutil.copy(folder / FIRST, folder / "checkpoint-500" / "model.safetensors")
    shutil.copy(folder / FIRST, folder / "consolidated.safetensors")
    assert read(folder) == before
    (folder / INDEX_NAME).unlink()
    (folder / "consolidated.safetensors").unlink()
    shutil.copy(folder / FIRST, folder / "optimizer.safetensors")
    assert read(folder) == before


def test_same_tensor_in_two_files_without_index_is_refused(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()
    shutil.copy(folder / FIRST, folder / "consolidated.safetensors")
    error = refused(folder, "index_inconsistent")
    assert f"is in two files, {folder}/consolidated.safetensors and {folder}/{FIRST}" in (
        error.detail
    )


def test_missing_file_is_named_with_what_it_holds(folder: Path) -> None:
    (folder / SECOND).unlink()
    weight_map = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
    lost = sum(name == SECOND for name in weight_map.values())
    error = refused(folder, "missing_file")
    assert f"lacks 1 of the 3 weight files that {INDEX_NAME} names: '{SECOND}'" in error.detail
    assert f"hold {lost} of its {len(weight_map)} tensors" in error.detail
    assert error.context["uri"] == f"{folder}/{SECOND}"


def test_missing_numbered_file_is_noticed_without_an_index(folder: Path) -> None:
    (folder / INDEX_NAME).unlink()
    (folder / SECOND).unlink()
    error = refused(folder, "missing_file")
    assert "holds 2 of the 3 weight files 'model'-…-of-3.safetensors" in error.detail


def test_tensor_in_the_index_but_not_in_its_file_is_named(folder: Path) -> None:
    edit_index(folder, ghost__weight=FIRST)
    error = refused(folder, "index_inconsistent")
    assert "1 tensors are in the index but not in the file it names: 'ghost.weight'" in error.detail


def test_tensor_in_a_file_but_not_in_the_index_is_named(folder: Path) -> None:
    edit_index(folder, model__norm__weight=None)
    error = refused(folder, "index_inconsistent")
    assert "1 tensors are in a file but not so in the index: 'model.norm.weight'" in error.detail


def test_tensor_in_another_file_than_the_index_says_is_named_both_ways(folder: Path) -> None:
    edit_index(folder, model__norm__weight=FIRST)
    detail = refused(folder, "index_inconsistent").detail
    assert detail.count("'model.norm.weight'") == 2


def test_many_faults_are_counted_and_the_first_ten_named(folder: Path) -> None:
    edit_index(folder, **{f"ghost__{number:02d}": FIRST for number in range(25)})
    detail = refused(folder, "index_inconsistent").detail
    assert "25 tensors are in the index but not" in detail
    assert "'ghost.09' and 15 more" in detail
    assert "ghost.10" not in detail


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "a/b.safetensors", "/etc/x.safetensors", "..\\x.safetensors",
     "s3:x.safetensors", ".safetensors", "..", "", "a\n.safetensors"],
)  # fmt: skip
def test_file_name_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    edit_index(folder, model__norm__weight=name)
    error = refused(folder, "index_inconsistent")
    assert f"puts tensor 'model.norm.weight' into file {name!r}" in error.detail


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not valid JSON"),
        ("[1]", "Expected `object`, got `array`"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "names no tensors"),
        ('{"weight_map": []}', "Expected `object`, got `array`"),
        ('{"weight_map": {"a": 1}}', "Expected `str`, got `int`"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "the key 'a' twice"),
        ('{"weight_map": {}, "weight_map": {}}', "the key 'weight_map' twice"),
        ('{"weight_map":' + "[" * 100_000, "nested too deeply"),
        ('{"metadata": {}, "weight_map": NaN}', "is not valid JSON"),
    ],
)
def test_damaged_index_is_refused(folder: Path, content: str, message: str) -> None:
    (folder / INDEX_NAME).write_text(content)
    assert message in refused(folder, "index_inconsistent").detail


def test_whole_model_beside_an_index_that_does_not_know_it_is_refused(folder: Path) -> None:
    shutil.copy(folder / FIRST, folder / "model.safetensors")
    error = refused(folder, "index_inconsistent")
    assert "Remove whichever of the two models is stale" in error.detail


def test_damaged_file_is_named(folder: Path) -> None:
    (folder / THIRD).write_bytes((folder / THIRD).read_bytes()[:-2])
    error = refused(folder, "header_invalid")
    assert error.context["uri"] == f"{folder}/{THIRD}"
    assert "it is cut short" in error.detail


def test_pickles_beside_safetensors_are_ignored(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    folder = write_checkpoint(tmp_path / "model", state)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert read(folder).tensors.keys() == state.keys()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter_is_refused_with_what_to_do(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    error = refused(folder, "missing_file")
    assert "Name it under 'models' of a recipe whose base_model" in error.detail


def test_folder_without_weights_says_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_text("")
    error = refused(tmp_path, "missing_file")
    assert f"expected model.safetensors, or {INDEX_NAME} with its files" in error.detail
    assert "'config.json', 'model.gguf'" in error.detail


@pytest.mark.parametrize("name", ["nothing", "empty", "meta-llama/Llama-3.1-8B"])
def test_nothing_there_is_not_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match="A checkpoint is a folder") as caught:
        read(tmp_path / name)
    assert caught.value.code == "not_found"
    assert caught.value.retryable is False


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b"[]", "is a list where an object is expected"),
        (b'{"a": "\xff"}', "is not UTF-8 at byte 7"),
        (b'{"a":' + b"[" * 100_000, "is nested too deeply"),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "is nested more than 64 levels deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"a": "' + b"x" * (4 << 20) + b'"}', "at most 4194304 are read"),
    ],
)
def test_damaged_config_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(content)
    assert message in refused(folder, "config_invalid").detail


def test_infinity_in_a_config_is_kept_as_transformers_writes_it(folder: Path) -> None:
    (folder / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert read(folder).config == {"time_step_limit": [0.0, {"__float__": "Infinity"}]}


def test_headers_are_read_once_and_weights_never() -> None:
    storage = MemoryStorage()
    weight_map: dict[str, str] = {}
    for number in range(1, 41):
        name = f"model-{number:05d}-of-00040.safetensors"
        text = encode_header([(f"layers.{number}.weight", "F32", (500, 500))], {})
        storage.write_bytes(f"mem://m/{name}", text + bytes(10**6))
        weight_map[f"layers.{number}.weight"] = name
    document: dict[str, Any] = {"weight_map": weight_map}
    storage.write_bytes(f"mem://m/{INDEX_NAME}", json.dumps(document).encode())
    index = read_checkpoint_index(storage, "mem://m/")
    assert index.uri == "mem://m"
    assert list(index.tensors) == [f"layers.{number}.weight" for number in range(1, 41)]
    assert [entry.file for entry in index.tensors.values()] == list(range(40))
    assert storage.requests == {"list": 1, "read_bytes": 1, "read_into": 40, "write_bytes": 41}
    assert storage.bytes_read < 41 * (64 << 10)


def test_forged_file_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    raw_file(tmp_path / "model.safetensors", {"a": []})
    refused(tmp_path, "header_invalid")


def test_family_of_tiny_models_has_small_different_task_vectors(tmp_path: Path) -> None:
    family = make_family(tmp_path, num_experts=2, hidden=32, dtype=torch.float32)
    base = read(family.base)
    for folder, expert_state in zip(family.experts, family.expert_states, strict=True):
        expert = read(folder)
        assert {name: entry.shape for name, entry in expert.tensors.items()} == {
            name: entry.shape for name, entry in base.tensors.items()
        }
        for name, tensor in expert_state.items():
            rms = (tensor - family.base_state[name]).square().mean().sqrt()
            assert 1e-4 < rms < 2e-3
    name = "model.layers.0.mlp.up_proj.weight"
    first, second = family.expert_states
    assert not torch.equal(first[name], second[name])
    again = make_family(tmp_path / "again", num_experts=2, hidden=32, dtype=torch.float32)
    for file in sorted(path.name for path in family.experts[1].iterdir()):
        assert (again.experts[1] / file).read_bytes() == (family.experts[1] / file).read_bytes()
