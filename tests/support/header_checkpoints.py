"""Checkpoints of zeros in a :class:`MemoryStorage`: all that planning looks at, without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from merging.checkpoint.header import encode_header
from merging.dtypes import ITEM_SIZE
from tests.support.memory_storage import MemoryStorage

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""dtype and shape by name."""

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def llama_tensors(
    *, hidden: int = 64, layers: int = 2, vocab: int = 128, dtype: str = "BF16"
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A small Llama's tensors, in the order in which transformers writes them: by name."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, 2 * hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (2 * hidden, hidden)
        shapes[f"{prefix}.self_attn.q_proj.weight"] = (hidden, hidden)
    return {name: (dtype, shape) for name, shape in sorted(shapes.items())}


def put_checkpoint(
    storage: MemoryStorage,
    uri: str,
    tensors: Tensors,
    *,
    config: Mapping[str, Any] | None = LLAMA_CONFIG,
    num_files: int = 1,
    companions: tuple[str, ...] = (),
) -> str:
    """Write a checkpoint whose weights are zeros; returns its address."""
    names = list(tensors)
    for number in range(num_files):
        part = names[number * len(names) // num_files : (number + 1) * len(names) // num_files]
        entries = [(name, *tensors[name]) for name in part]
        size = sum(math.prod(shape) * ITEM_SIZE[dtype] for _, dtype, shape in entries)
        data = encode_header(entries, {"format": "pt"}) + bytes(size)
        name = "model.safetensors"
        if num_files > 1:
            name = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        storage.write_bytes(f"{uri}/{name}", data)
    if config is not None:
        storage.write_bytes(f"{uri}/config.json", json.dumps(config).encode())
    for name in companions:
        storage.write_bytes(f"{uri}/{name}", b"{}")
    return uri
