"""What a plan tells of its checkpoints beside their weights."""

from __future__ import annotations

from typing import Any

import msgspec


class Companion(msgspec.Struct, frozen=True):
    """A small file to be copied beside the weights (tokenizer, generation config …)."""

    source_uri: str
    file_name: str
    version: str


class Variant(msgspec.Struct, frozen=True):
    """A variant of a sweep.

    Attributes:
        name: The folder of its checkpoint, under the plan's output.
        recipe: Its normalised recipe, as of a merge by itself.
        recipe_digest: ``sha256:…`` of it.
        method: Name of its method.
    """

    name: str
    recipe: dict[str, Any]
    recipe_digest: str
    method: str
