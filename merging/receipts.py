"""Receipts: the small durable records that a shard of a plan is published.

They live at ``<output>/.mergeyard/<first 16 hex digits of the plan digest>/<file name>.json`` until
the checkpoint is complete. Work that stopped anywhere resumes from them.
"""

from __future__ import annotations

from typing import Any

import msgspec

from merging.errors import StorageError
from merging.plan.plan import Shard, file_uri, workspace_uri
from merging.rates import Rates
from merging.storage.base import Storage

_LIMIT = 64 << 20


class ProblemFigures(msgspec.Struct, frozen=True):
    """What happened to one tensor: time in the method and the figures it reported."""

    tensor_name: str
    method: str
    solve_seconds: float
    figures: dict[str, Any] = {}


class Receipt(msgspec.Struct, frozen=True):
    """A published shard.

    Attributes:
        plan_digest: The plan it belongs to.
        shard_index: Which shard.
        file_name: The file.
        size: Its bytes.
        sha256: Hex digest of the file.
        version: Its version pin in storage.
        bytes_read: Bytes fetched from sources.
        read_requests: Ranged reads that took.
        peak_buffer_bytes: Most host bytes held in tensor buffers at once.
        seconds: Wall time by stage: ``fetch``, ``solve``, ``write``, ``total``.
        device: Where it was solved (``cpu``, ``cuda:0 NVIDIA …``).
        worker: Which process did it.
        problems: Figures per tensor, in file order.
        busy_seconds: Wall time in which bytes were moving, beside the solving: ``read``, ``write``.
        rates: What was known of the worker's speed when it began; None if nothing was.
    """

    plan_digest: str
    shard_index: int
    file_name: str
    size: int
    sha256: str
    version: str
    bytes_read: int
    read_requests: int
    peak_buffer_bytes: int
    seconds: dict[str, float]
    device: str
    worker: str
    problems: tuple[ProblemFigures, ...]
    busy_seconds: dict[str, float] = {}
    rates: Rates | None = None


def receipt_uri(output_uri: str, plan_digest: str, file_name: str) -> str:
    """Address of one receipt."""
    return f"{workspace_uri(output_uri, plan_digest)}/{file_name}.json"


def write_receipt(storage: Storage, output_uri: str, receipt: Receipt) -> None:
    """Record that a shard is published; written after the shard itself is visible."""
    uri = receipt_uri(output_uri, receipt.plan_digest, receipt.file_name)
    storage.write_bytes(uri, msgspec.json.encode(receipt))


def read_receipt(
    storage: Storage, output_uri: str, plan_digest: str, shard: Shard
) -> Receipt | None:
    """The receipt of a shard if it is published and its file is still the one recorded."""
    try:
        uri = receipt_uri(output_uri, plan_digest, shard.file_name)
        receipt = msgspec.json.decode(storage.read_bytes(uri, limit=_LIMIT), type=Receipt)
        stat = storage.stat(file_uri(output_uri, plan_digest, shard))
    except StorageError as error:
        if error.code == "not_found":
            return None
        raise
    except msgspec.MsgspecError:
        return None
    if receipt.plan_digest != plan_digest or stat.version != receipt.version:
        return None
    return receipt
