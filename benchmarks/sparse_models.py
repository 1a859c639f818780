"""Checkpoints as large as real ones that take no room: honest headers, and files full of holes.

Smaller ones can be filled with random weights, for programs whose speed depends on the values.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from merging.checkpoint.header import encode_header

_FILE_BYTES = 5 * 10**9
_ITEM_BYTES = 2  # bfloat16
_HEAD = 128
_CHUNK = 1 << 22


class Shape(NamedTuple):
    """What the sizes of a Llama's tensors follow from."""

    hidden: int
    intermediate: int
    layers: int
    key_value: int
    vocab: int


SHAPES = {
    "13B": Shape(5120, 13824, 40, 5120, 32000),
    "70B": Shape(8192, 28672, 80, 1024, 32000),
    "405B": Shape(16384, 53248, 126, 1024, 128256),
}


def write_sparse_model(folder: Path, shape: Shape) -> Path:
    """Write a checkpoint whose weights are zeros, in files of 5 GB; returns the folder."""
    return _write(folder, shape, _tensors(shape))


def write_sparse_mixture(folder: Path, layers: int) -> Path:
    """Likewise one of the shapes of DeepSeek V3: 256 experts in each layer, 768 tensors."""
    hidden, inner = 7168, 2048
    shapes = {
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    tensors = [
        (f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight", shape)
        for layer in range(layers)
        for expert in range(256)
        for name, shape in shapes.items()
    ]
    return _write(folder, Shape(hidden, inner, layers, 128, 129280), tensors)


def _write(folder: Path, shape: Shape, tensors: Sequence[tuple[str, tuple[int, ...]]]) -> Path:
    folder.mkdir(parents=True)
    files: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    room = _FILE_BYTES
    for name, dims in tensors:
        size = math.prod(dims) * _ITEM_BYTES
        if size > room and files[-1]:
            files.append([])
            room = _FILE_BYTES
        room -= size
        files[-1].append((name, "BF16", dims))
    weight_map = {}
    for number, entries in enumerate(files, 1):
        file_name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        header = encode_header(entries, {"format": "pt"})
        size = sum(math.prod(dims) * _ITEM_BYTES for _, _, dims in entries)
        with (folder / file_name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + size)
        weight_map |= {name: file_name for name, _, _ in entries}
    total = sum(math.prod(dims) * _ITEM_BYTES for _, dims in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "tie_word_embeddings": False,
                "torch_dtype": "bfloat16",
                "hidden_size": shape.hidden,
                "intermediate_size": shape.intermediate,
                "num_hidden_layers": shape.layers,
                "num_attention_heads": shape.hidden // _HEAD,
                "num_key_value_heads": shape.key_value // _HEAD,
                "vocab_size": shape.vocab,
            }
        )
    )
    return folder


def write_random_family(folder: Path, shape: Shape, num_experts: int) -> tuple[Path, list[Path]]:
    """Write a base model and experts of it with random weights, through to the disk.

    Weights of the base have a standard deviation of 0.02, task vectors one of 0.001.

    Returns:
        The folders of the base and of the experts.
    """
    base = write_sparse_model(folder / "base", shape)
    experts = [folder / f"expert-{number}" for number in range(num_experts)]
    for expert in experts:
        shutil.copytree(base, expert)
    generator = torch.Generator().manual_seed(0)
    for path in sorted(base.glob("*.safetensors")):
        _fill([path, *(expert / path.name for expert in experts)], generator)
    return base, experts


def _fill(paths: Sequence[Path], generator: torch.Generator) -> None:
    """Write weights after the headers, which are the same in all of these files."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("r+b")) for path in paths]
        start = 8 + int.from_bytes(files[0].read(8), "little")
        for file in files:
            file.seek(start)
        left = (paths[0].stat().st_size - start) // _ITEM_BYTES
        noise = torch.empty(_CHUNK)
        while left:
            count = min(left, _CHUNK)
            base = torch.empty(count).normal_(0, 0.02, generator=generator).bfloat16()
            for number, file in enumerate(files):
                task_vector = noise[:count].normal_(0, 1e-3, generator=generator)
                weights = (base + task_vector).bfloat16() if number else base
                file.write(weights.view(torch.uint8).numpy().data)
            left -= count
        for file in files:
            file.flush()
            os.fsync(file.fileno())


def _tensors(shape: Shape) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in the order of the model."""
    hidden, intermediate, layers, key_value, vocab = shape
    tensors: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors += [
            (f"{prefix}.input_layernorm.weight", (hidden,)),
            (f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)),
            (f"{prefix}.self_attn.k_proj.weight", (key_value, hidden)),
            (f"{prefix}.self_attn.v_proj.weight", (key_value, hidden)),
            (f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)),
            (f"{prefix}.post_attention_layernorm.weight", (hidden,)),
            (f"{prefix}.mlp.gate_proj.weight", (intermediate, hidden)),
            (f"{prefix}.mlp.up_proj.weight", (intermediate, hidden)),
            (f"{prefix}.mlp.down_proj.weight", (hidden, intermediate)),
        ]
    return [*tensors, ("model.norm.weight", (hidden,)), ("lm_head.weight", (vocab, hidden))]
