"""Tiny PEFT adapters in the layout that peft writes, and the checkpoints that they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from merging.method import get_method
from tests.support.checkpoints import (
    tiny_llama_config,
    tiny_llama_state,
    write_checkpoint,
)

MODULES = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """Write an adapter's folder; ``config`` is what differs from peft's defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(**config)))
    return folder


def adapter_config(**config: Any) -> dict[str, Any]:
    """``adapter_config.json`` as peft 0.21 writes it, of rank 4 and alpha 8."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": "models/base",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "lora_alpha": 8,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "qalora_group_size": 16,
        "r": 4,
        "rank_pattern": {},
        "target_modules": list(MODULES),
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_rslora": False,
    } | config


def factors(
    module: str, rows: int, columns: int, rank: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Factors of one module whose product has entries of about 5e-4."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        f"base_model.model.{module}.lora_A.weight": 0.02 * normal(rank, columns),
        f"base_model.model.{module}.lora_B.weight": 0.01 * normal(rows, rank) / rank**0.5,
    }


@dataclass(frozen=True, slots=True)
class AdapterFamily:
    """A base model, adapters of it, and the float32 checkpoints that these stand for.

    Attributes:
        base: Folder of the base model.
        adapters: Folders of the adapters.
        experts: Folders of the checkpoints.
        base_state: The base's weights.
        updates: Of each adapter, the float64 update by tensor name.
    """

    base: Path
    adapters: tuple[Path, ...]
    experts: tuple[Path, ...]
    base_state: dict[str, torch.Tensor]
    updates: tuple[dict[str, torch.Tensor], ...]

    def recipe(self, method: str, models: Sequence[object], **parameters: Any) -> dict[str, Any]:
        """A recipe with float32 output."""
        document: dict[str, Any] = {
            "merge_method": method,
            "models": [{"model": str(model)} for model in models],
            "out_dtype": "float32",
        }
        if get_method(method).needs_base:
            document["base_model"] = str(self.base)
        if parameters:
            document["parameters"] = parameters
        return document


def make_adapters(
    folder: Path,
    ranks: Sequence[int] = (4, 2, 4),
    *,
    hidden: int = 64,
    layers: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    factor_dtype: torch.dtype = torch.float32,
    whole: bool = True,
) -> AdapterFamily:
    """Write a tiny Llama and adapters of some of its layers, each of a rank.

    The first adapter leaves the last of several layers alone; alpha is 8.

    Args:
        folder: Where ``base``, ``adapter-0`` … and ``whole-0`` … go.
        ranks: Of each adapter.
        hidden: As of the tiny Llama.
        layers: Likewise.
        dtype: Of the base.
        factor_dtype: Of the adapters.
        whole: Also write the checkpoints that the adapters stand for.
    """
    config = tiny_llama_config(hidden=hidden, layers=layers, dtype=dtype)
    state = tiny_llama_state(hidden=hidden, layers=layers, dtype=dtype)
    base = write_checkpoint(folder / "base", state, config=config, tokenizer=True)
    adapters, experts, updates = [], [], []
    for number, rank in enumerate(ranks):
        generator = torch.Generator().manual_seed(100 + number)
        tensors: dict[str, torch.Tensor] = {}
        update = {}
        for name, tensor in state.items():
            module = name.removesuffix(".weight")
            skipped = number == 0 and layers > 1 and f"layers.{layers - 1}." in name
            if module.split(".")[-1] in MODULES and not skipped:
                made = factors(module, *tensor.shape, rank, generator)
                made = {key: value.to(factor_dtype) for key, value in made.items()}
                tensors |= made
                down, up = (value.double() for value in made.values())
                update[name] = 8 / rank * up @ down
        adapters.append(write_adapter(folder / f"adapter-{number}", tensors, r=rank))
        updates.append(update)
        if whole:
            merged = {n: (t.double() + update.get(n, 0)).float() for n, t in state.items()}
            path = write_checkpoint(folder / f"whole-{number}", merged, config=config)
            experts.append(path)
    return AdapterFamily(base, tuple(adapters), tuple(experts), state, tuple(updates))
