from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from merging.checkpoint.adapter import AdapterIndex, read_model_index
from merging.checkpoint.adapter_config import parse_adapter_config
from merging.checkpoint.index import CheckpointIndex
from merging.errors import CheckpointError
from merging.storage.router import open_storage
from tests.support.adapters import adapter_config, write_adapter
from tests.support.checkpoints import write_checkpoint

URI = "s3://bucket/adapter/adapter_config.json"


def parse(**config: Any) -> Any:
    return parse_adapter_config(json.dumps(adapter_config(**config)).encode(), URI)


def refused(**config: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        parse(**config)
    assert URI in caught.value.detail
    return caught.value


def test_what_the_merged_weights_depend_on_is_read() -> None:
    found = parse(r=16, lora_alpha=32, use_rslora=True, base_model_name_or_path="org/model")
    assert (found.rank, found.alpha, found.base_name) == (16, 32, "org/model")
    assert found.scaling_of("model.layers.0.q_proj", 16) == 8
    assert found.rank_of("model.layers.0.q_proj") == 16


def test_peft_s_defaults_hold_for_what_is_left_out() -> None:
    found = parse_adapter_config(b'{"peft_type": "LORA"}', URI)
    assert (found.rank, found.alpha, found.is_rank_stabilised) == (8, 8, False)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("use_dora", True, "DoRA"),
        ("target_parameters", ["experts.up"], "target_parameters"),
        ("trainable_token_indices", [1, 2], "single tokens"),
        ("layer_replication", [[0, 2]], "repeats layers"),
        ("alora_invocation_tokens", [7], "aLoRA"),
        ("lora_bias", True, "biases of their own"),
        ("init_lora_weights", "olora", "may have changed the base"),
        ("init_lora_weights", 1.5, "may have changed the base"),
        ("peft_type", "LOHA", "only LORA"),
        ("peft_type", None, "only LORA"),
        ("use_something_new", 3, "['use_something_new']"),
    ],
)
def test_what_would_not_be_merged_exactly_is_refused(key: str, value: object, says: str) -> None:
    error = refused(**{key: value})
    assert error.code == "adapter_unsupported"
    assert says in error.detail
    assert "merge_and_unload()" in error.detail


def test_all_reasons_are_told_at_once() -> None:
    error = refused(use_dora=True, lora_bias=True, init_lora_weights="pissa_niter_4")
    assert all(word in error.detail for word in ("DoRA", "lora_bias", "pissa_niter_4"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", 2.5),
        ("r", "8"),
        ("r", True),
        ("lora_alpha", None),
        ("lora_alpha", "much"),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": "1"}),
        ("alpha_pattern", {"(": 1}),
        ("alpha_pattern", {"(a|a)*b": 1}),
        ("alpha_pattern", {".*.*.*.*x": 1}),
        ("alpha_pattern", {"x" * 501: 1}),
        ("alpha_pattern", {r"(a)\1": 1}),
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_refused(key: str, value: object) -> None:
    assert refused(**{key: value}).code == "config_invalid"


@pytest.mark.parametrize("data", [b"", b"[]", b'{"r": 1', b"\xff"])
def test_text_that_is_no_config_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_adapter_config(data, URI)
    assert caught.value.code == "config_invalid"


def test_infinite_alpha_is_refused() -> None:
    data = json.dumps(adapter_config(lora_alpha=float("inf"))).encode()
    with pytest.raises(CheckpointError, match="lora_alpha"):
        parse_adapter_config(data, URI)


def test_a_folder_holds_a_model_or_an_adapter(tmp_path: Path) -> None:
    storage = open_storage()
    tensors = {"a.weight": torch.zeros(2, 2)}
    model = write_checkpoint(tmp_path / "model", tensors)
    assert isinstance(read_model_index(storage, str(model)), CheckpointIndex)
    adapter = write_adapter(tmp_path / "adapter", tensors)
    found = read_model_index(storage, str(adapter))
    assert isinstance(found, AdapterIndex)
    assert found.tensors.keys() == tensors.keys()
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks adapter_config\.json"):
        read_model_index(storage, str(adapter))
