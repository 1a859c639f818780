"""Tiny checkpoints for tests: honest ones in the layout of Hugging Face, and forged files.

Everything is drawn from a seeded generator, so the same call writes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

INDEX_NAME = "model.safetensors.index.json"


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
    index: bool = True,
    tokenizer: bool = False,
) -> Path:
    """Write a checkpoint folder.

    Args:
        folder: Created if need be.
        tensors: By name; the order decides which file a tensor is in.
        config: ``config.json``; None writes none.
        shards: Number of weight files; one is ``model.safetensors`` without an index.
        index: Whether several files get an index.
        tokenizer: Also write small tokenizer, chat template and generation files, and a model card.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file_name = "model.safetensors"
        if shards > 1:
            file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        weight_map |= dict.fromkeys(part, file_name)
        contents = {name: tensors[name].contiguous() for name in part}
        save_file(contents, folder / file_name, metadata={"format": "pt"})
    if shards > 1 and index:
        total = sum(tensor.nbytes for tensor in tensors.values())
        document = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(document, indent=2))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    if tokenizer:
        _write_companions(folder)
    return folder


def tiny_llama_config(
    *, hidden: int = 64, layers: int = 2, vocab: int = 256, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """``config.json`` of :func:`tiny_llama_state`; transformers loads the two together."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def tiny_llama_state(
    seed: int = 0,
    *,
    hidden: int = 64,
    layers: int = 2,
    vocab: int = 256,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Weights named and shaped as Llama's, with grouped queries and an MLP of twice the width."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}mlp.down_proj.weight": (hidden, 2 * hidden),
            f"{prefix}mlp.gate_proj.weight": (2 * hidden, hidden),
            f"{prefix}mlp.up_proj.weight": (2 * hidden, hidden),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}self_attn.k_proj.weight": (hidden // 2, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}self_attn.q_proj.weight": (hidden, hidden),
            f"{prefix}self_attn.v_proj.weight": (hidden // 2, hidden),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return {name: _draw(shape, generator).to(dtype) for name, shape in shapes.items()}


@dataclass(frozen=True, slots=True)
class Family:
    """A base model and its experts, as written.

    Attributes:
        base: Folder of the base model.
        experts: Folders of the experts.
        base_state: The base's weights.
        expert_states: The experts' weights.
    """

    base: Path
    experts: tuple[Path, ...]
    base_state: dict[str, torch.Tensor]
    expert_states: tuple[dict[str, torch.Tensor], ...]


def make_family(
    folder: Path,
    num_experts: int = 3,
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    vocab: int = 256,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    rms: float = 5e-4,
    rank: int = 8,
) -> Family:
    """Write a tiny Llama, ``folder/base``, and experts tuned from it, ``folder/expert-0`` ….

    Task vectors are like those of real fine-tunes: small (``rms`` per entry), close to low rank in
    matrices (``rank`` directions and a tenth as much noise), different for each expert.
    """
    sizes = {"hidden": hidden, "layers": layers, "vocab": vocab}
    config = tiny_llama_config(**sizes, dtype=dtype)
    base_state = tiny_llama_state(seed, **sizes, dtype=dtype)
    states = [
        tune(base_state, seed=1000 * (seed + 1) + number, rms=rms, rank=rank)
        for number in range(num_experts)
    ]
    options: dict[str, Any] = {"config": config, "shards": shards, "tokenizer": True}
    return Family(
        base=write_checkpoint(folder / "base", base_state, **options),
        experts=tuple(
            write_checkpoint(folder / f"expert-{number}", state, **options)
            for number, state in enumerate(states)
        ),
        base_state=base_state,
        expert_states=tuple(states),
    )


def tune(
    base_state: Mapping[str, torch.Tensor], *, seed: int, rms: float = 5e-4, rank: int = 8
) -> dict[str, torch.Tensor]:
    """An expert's weights: the base's plus a small task vector in every tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.float() + _task_vector(tensor.shape, generator, rms, rank)).to(tensor.dtype)
        for name, tensor in base_state.items()
    }


def raw_file(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """Forge a safetensors file.

    Args:
        path: Where.
        header: Bytes as they are, or an object to be written as JSON.
        data: What follows the header.
        length: What the first eight bytes claim; None is the truth.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw_bytes(header, data, length=length))
    return path


def raw_bytes(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of :func:`raw_file`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    claimed = len(text) if length is None else length
    return claimed.to_bytes(8, "little") + text + data


def _draw(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms are near one, matrices have the spread of a trained model's."""
    noise = torch.randn(shape, generator=generator) * 0.02
    return noise + 1 if len(shape) == 1 else noise


def _task_vector(
    shape: torch.Size, generator: torch.Generator, rms: float, rank: int
) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 2:
        left = torch.randn(shape[0], rank, generator=generator)
        right = torch.randn(rank, shape[1], generator=generator)
        noise = left @ right / rank**0.5 + 0.1 * noise
    return rms * noise


def _write_companions(folder: Path) -> None:
    vocabulary = {chr(97 + letter): letter for letter in range(26)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}
    files: dict[str, object] = {
        "tokenizer.json": {"version": "1.0", "model": model},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "special_tokens_map.json": {"unk_token": "a"},
        "generation_config.json": {"do_sample": False},
    }
    for name, document in files.items():
        (folder / name).write_text(json.dumps(document))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (folder / "README.md").write_text("# A tiny model\n")
