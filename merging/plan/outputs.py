"""What a plan tells of its checkpoints beside their tensors, and in sum."""

from __future__ import annotations

from typing import Any, Literal

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


class Input(msgspec.Struct, frozen=True):
    """An input checkpoint, for lineage and the report.

    ``digest`` is a hash over its files' names, sizes and versions (not over the weights).
    """

    uri: str
    role: Literal["base", "expert"]
    digest: str


class Totals(msgspec.Struct, frozen=True):
    """Sums over the plan: bytes and operations of all shards, tensors of the output.

    ``bytes_intermediate`` are those of ``bytes_written`` that go to the workspace; what is read of
    them is in ``bytes_read``.
    """

    tensors: int
    bytes_read: int
    bytes_written: int
    flops: float
    max_host_bytes: int
    max_device_bytes: int
    bytes_intermediate: int = 0
