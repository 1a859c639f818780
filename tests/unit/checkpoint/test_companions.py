"""Which files beside the weights belong to a model."""

from __future__ import annotations

import pytest

from merging.checkpoint.companions import is_companion


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
        "sentencepiece.bpe.model", "tokenizer.model.v3", "source.spm", "qwen.tiktoken",
        "tekken.json", "chat_template.json", "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja", "generation_config.json",
        "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
        "bpe.codes", "normalizer.json",
    ],
)  # fmt: skip
def test_belongs_to_the_model(name: str) -> None:
    assert is_companion(name)


@pytest.mark.parametrize(
    "name",
    [
        # weights
        "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
        "consolidated.00.pth", "model.gguf", "model.onnx", "tf_model.h5", "flax_model.msgpack",
        # code
        "modeling_custom.py", "tokenization_custom.py", "tokenizer.py",
        "custom_generate/generate.py",
        # what a merge writes itself
        "config.json", "README.md", "LICENSE", "mergekit_config.yml", ".gitattributes",
        # left by training
        "optimizer.pt", "trainer_state.json", "training_args.bin", "rng_state.pth", "scheduler.pt",
        "vocab.bin", "vocab.pkl", "adapter_config.json", "runs/events.out.tfevents",
        # of another model
        "checkpoint-500/tokenizer.json", "original/tokenizer.model", "onnx/vocab.json",
        "additional_chat_templates/evil.py", "additional_chat_templates/a/b.jinja",
        "additional_chat_templates/../x.jinja", "", "tokenizer.json/", "TOKENIZER.JSON",
        "a\nb.model",
    ],
)  # fmt: skip
def test_does_not_belong_to_the_model(name: str) -> None:
    assert not is_companion(name)
