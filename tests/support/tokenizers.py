"""Small tokenizers as the tokenizers library writes them: words between spaces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.support.checkpoints import tiny_llama_config, tiny_llama_state, write_checkpoint


def write_tokenizer(folder: Path, words: Sequence[str], special: Sequence[str] = ()) -> None:
    """Write ``tokenizer.json`` and its config: words with numbers from 0 on, then special tokens.

    The first word is what stands for unknown ones.
    """
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": len(words) + number, "content": token, **plain, "special": True}
        for number, token in enumerate(special)
    ]
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(words)},
            "unk_token": words[0],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": words[0],
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in added
        },
    }
    if special:
        config["eos_token"] = special[-1]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(
    folder: Path,
    words: Sequence[str],
    special: Sequence[str] = (),
    *,
    seed: int = 0,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Write a tiny Llama with a tokenizer of its own; its weights.

    Embeddings have a row for each token, unless ``rows`` says how many.
    """
    num_tokens = len(words) + len(special)
    vocab = num_tokens if rows is None else rows
    state = tiny_llama_state(seed, hidden=16, vocab=vocab, dtype=dtype)
    config = tiny_llama_config(hidden=16, vocab=vocab, dtype=dtype)
    config |= {"bos_token_id": 1, "eos_token_id": num_tokens - 1}
    write_checkpoint(folder, state, config=config)
    write_tokenizer(folder, words, special)
    return state
