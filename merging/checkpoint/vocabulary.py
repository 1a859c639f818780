"""A model's vocabulary, read from ``tokenizer.json`` as untrusted input."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import msgspec

from merging.checkpoint.companions import is_companion
from merging.errors import CheckpointError
from merging.storage.base import Storage

TOKENIZER_NAME = "tokenizer.json"

_MAX_BYTES = 256 << 20  # a vocabulary of 260,000 tokens with its merges has 33 MB

_OTHERS = (
    "generation_config.json",
    "*processor_config.json",
    "feature_extractor_config.json",
)
"""Companions that are no part of a tokenizer."""


class _Added(msgspec.Struct):
    id: int
    content: str


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[Any, ...]] = {}


class _Tokenizer(msgspec.Struct):
    model: _Model = msgspec.field(default_factory=_Model)
    added_tokens: list[_Added] = []


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of a model's folder belongs to its tokenizer, chat template included."""
    return is_companion(name) and not any(fnmatchcase(name, pattern) for pattern in _OTHERS)


def read_vocabulary(storage: Storage, uri: str, version: str) -> dict[str, int]:
    """The tokens of a ``tokenizer.json`` with their numbers; added ones go before others.

    Args:
        storage: Where it is.
        uri: Of the file.
        version: Of the file.

    Raises:
        CheckpointError: ``config_invalid``: it is not a tokenizer.
        StorageError: It cannot be read.
    """
    data = storage.read_bytes(uri, limit=_MAX_BYTES, version=version)
    try:
        found = msgspec.json.decode(data, type=_Tokenizer)
        vocabulary = _numbered(found.model.vocab)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise CheckpointError(
            f"{uri} is not a tokenizer as the tokenizers library writes it ({error}). Copy or save"
            " it again.",
            code="config_invalid",
            context={"uri": uri},
        ) from None
    return vocabulary | {token.content: token.id for token in found.added_tokens}


def _numbered(vocab: dict[str, int] | list[tuple[Any, ...]]) -> dict[str, int]:
    """Tokens with their numbers; Unigram models list tokens with scores, in their order."""
    if isinstance(vocab, dict):
        return vocab
    if not all(item and isinstance(item[0], str) for item in vocab):
        raise ValueError("the vocabulary lists something else than tokens")
    return {item[0]: number for number, item in enumerate(vocab)}
