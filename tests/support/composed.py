"""Tiny models with several parts, as transformers makes and writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file


def write_t5(folder: Path, *, seed: int, layers: int = 2) -> dict[str, torch.Tensor]:
    """A T5 with an encoder and a decoder; its weights as they are stored."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": 48}
    config = T5Config(
        **sizes,
        num_layers=layers,
        num_decoder_layers=layers,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return _write(T5ForConditionalGeneration(config), folder, seed)


def write_llava(folder: Path, *, seed: int, layers: int = 2) -> dict[str, torch.Tensor]:
    """A LLaVA: CLIP's vision tower, a projector, a Llama; its weights as they are stored."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=layers, image_size=8, patch_size=4)
    text = LlamaConfig(**sizes, num_hidden_layers=layers, num_key_value_heads=2, vocab_size=64)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=63, vision_feature_layer=-1
    )
    return _write(LlavaForConditionalGeneration(config), folder, seed)


def _write(model: torch.nn.Module, folder: Path, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")
