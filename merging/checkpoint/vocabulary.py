"""A model's vocabulary, read from ``tokenizer.json`` as untrusted input."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from merging.checkpoint.companions import is_companion
from merging.errors import CheckpointError
from merging.storage.base import Storage

TOKENIZER_NAME = "tokenizer.json"

MAX_TOKENIZER_BYTES = 256 << 20  # a vocabulary of 260,000 tokens with its merges has 33 MB

_MAX_TOKENS = 1 << 22

_OTHERS = (
    "generation_config.json",
    "*processor_config.json",
    "feature_extractor_config.json",
)
"""Companions that are no part of a tokenizer."""


class AddedToken(msgspec.Struct, frozen=True, omit_defaults=True):
    """A token beside those of the tokenizer's model, as ``tokenizer.json`` has it."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[Any, ...]] = {}


class _Tokenizer(msgspec.Struct):
    model: _Model = msgspec.field(default_factory=_Model)
    added_tokens: list[AddedToken] = []


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """What planning must know of a tokenizer.

    Attributes:
        vocabulary: All tokens with their numbers.
        added: Those that are no part of its model, in their order.
    """

    vocabulary: dict[str, int]
    added: tuple[AddedToken, ...]


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of a model's folder belongs to its tokenizer, chat template included."""
    return is_companion(name) and not any(fnmatchcase(name, pattern) for pattern in _OTHERS)


def read_tokenizer(storage: Storage, uri: str, version: str) -> Tokenizer:
    """Read a ``tokenizer.json``; of equal tokens, added ones go before others.

    Args:
        storage: Where it is.
        uri: Of the file.
        version: Of the file.

    Raises:
        CheckpointError: ``config_invalid``: it is not a tokenizer.
        StorageError: It cannot be read.
    """
    data = storage.read_bytes(uri, limit=MAX_TOKENIZER_BYTES, version=version)
    try:
        found = msgspec.json.decode(data, type=_Tokenizer)
        vocabulary = _numbered(found.model.vocab)
        vocabulary |= {token.content: token.id for token in found.added_tokens}
        if not all(0 <= number < _MAX_TOKENS for number in vocabulary.values()):
            raise ValueError("a token has a number out of range")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise CheckpointError(
            f"{uri} is not a tokenizer as the tokenizers library writes it ({error}). Copy or save"
            " it again.",
            code="config_invalid",
            context={"uri": uri},
        ) from None
    return Tokenizer(vocabulary, tuple(found.added_tokens))


def _numbered(vocab: dict[str, int] | list[tuple[Any, ...]]) -> dict[str, int]:
    """Tokens with their numbers; Unigram models list tokens with scores, in their order."""
    if isinstance(vocab, dict):
        return vocab
    if not all(item and isinstance(item[0], str) for item in vocab):
        raise ValueError("the vocabulary lists something else than tokens")
    return {item[0]: number for number, item in enumerate(vocab)}
