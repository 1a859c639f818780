"""Which files beside the weights belong to a model and are carried over to a merged one.

Decided by name alone, and by what is allowed rather than by what is not: tokenizer, chat template,
generation settings and preprocessors. Never weights in any format, never code, never the model
card (a merge writes its own), never what training leaves behind. ``config.json`` and the weight
index are not companions: a merge writes them itself.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

_PATTERNS = (
    # tokenizers of the tokenizers library, and their older forms
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "normalizer.json",
    # sentencepiece (tokenizer.model, spiece.model, Mistral's tokenizer.model.v3), tiktoken, tekken
    "*.model", "tokenizer.model.v*", "*.spm", "*.tiktoken", "tekken.json",
    "chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
    "generation_config.json",
    # images, sound and video
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "feature_extractor_config.json", "video_preprocessor_config.json",
)  # fmt: skip


def is_companion(name: str) -> bool:
    """Whether a file, by its name relative to the checkpoint's folder, belongs to the model."""
    if name.count("/") != name.startswith("additional_chat_templates/"):
        return False
    return name.isprintable() and any(fnmatchcase(name, pattern) for pattern in _PATTERNS)
