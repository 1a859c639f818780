"""Tokens added to the files of a tokenizer, by exact edits of their JSON.

Tokens are only ever appended, so that merges, post-processors and special ids stay what they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from merging.checkpoint.documents import parse_config
from merging.checkpoint.vocabulary import TOKENIZER_NAME, AddedToken


def edit_tokenizer_file(name: str, data: bytes, uri: str, tokens: Sequence[AddedToken]) -> bytes:
    """The file with the tokens; those that it has already under these numbers are replaced.

    Args:
        name: One of those in :data:`EDITED`.
        data: Its contents.
        uri: Its address, for messages.
        tokens: What is added, with numbers.

    Raises:
        CheckpointError: ``config_invalid``: it is not JSON.
    """
    document = parse_config(data, uri)
    EDITED[name](document, tokens)
    return json.dumps(document, ensure_ascii=False, indent=2).encode()


def _add_to_tokenizer(document: dict[str, Any], tokens: Sequence[AddedToken]) -> None:
    own = {item["id"]: item for item in document.get("added_tokens") or []}
    own |= {token.id: msgspec.structs.asdict(token) for token in tokens}
    document["added_tokens"] = [own[number] for number in sorted(own)]


def _add_to_config(document: dict[str, Any], tokens: Sequence[AddedToken]) -> None:
    """``tokenizer_config.json`` repeats added tokens, if an older transformers wrote it."""
    decoder = document.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for token in tokens:
            attributes = msgspec.structs.asdict(token)
            decoder[str(attributes.pop("id"))] = attributes


def _add_to_list(document: dict[str, Any], tokens: Sequence[AddedToken]) -> None:
    document.update({token.content: token.id for token in tokens})


EDITED: dict[str, Callable[[dict[str, Any], Sequence[AddedToken]], None]] = {
    TOKENIZER_NAME: _add_to_tokenizer,
    "tokenizer_config.json": _add_to_config,
    "added_tokens.json": _add_to_list,
}
"""Files that list added tokens, and how."""
