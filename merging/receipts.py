"""Receipts: the small durable records that a shard of a plan is published.

They live at ``<output>/.mergeyard/<first 16 hex digits of the plan digest>/<file name>.json`` until
the checkpoint is complete. Work that stopped anywhere resumes from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from merging.errors import StorageError
from merging.plan.plan import Shard, file_uris, workspace_uri
from merging.rates import Rates
from merging.storage.base import Storage

_LIMIT = 64 << 20


class ProblemFigures(msgspec.Struct, frozen=True):
    """What happened to one tensor: time in the method and the figures it reported."""

    tensor_name: str
    method: str
    solve_seconds: float
    figures: dict[str, Any] = {}


class OtherFile(msgspec.Struct, frozen=True):
    """The file of a further variant of a sweep; as the fields of :class:`Receipt`."""

    size: int
    sha256: str
    version: str
    problems: tuple[ProblemFigures, ...]


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
        reused: The file was made by an earlier merge; it was read and compared, and not written.
        others: In a sweep, the files of its other variants, in order; what stands above is then of
            the first one's file, but for bytes, memory and time, which are of all.
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
    others: tuple[OtherFile, ...] = ()
    reused: bool = False

    @property
    def versions(self) -> tuple[str, ...]:
        """Version pins of all files."""
        return (self.version, *(other.version for other in self.others))

    @property
    def bytes_written(self) -> int:
        """Bytes of all files that were written."""
        if self.reused:
            return 0
        return self.size + sum(other.size for other in self.others)

    def of_variant(self, number: int) -> Receipt:
        """The receipt of one variant's file."""
        if not number or not self.others:
            return msgspec.structs.replace(self, others=())
        file = self.others[number - 1]
        return msgspec.structs.replace(
            self,
            size=file.size,
            sha256=file.sha256,
            version=file.version,
            problems=file.problems,
            others=(),
        )


def describe_statistics(receipts: Sequence[Receipt]) -> list[dict[str, Any]]:
    """What was measured on samples, for each model and its samples.

    ``blocks`` counts files of statistics, ``reused`` those of an earlier merge.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for receipt in receipts:
        told = receipt.problems[0].figures if receipt.problems else {}
        if "sample_digest" not in told:
            continue
        names = ("model", "samples", "tokens", "sample_digest")
        fresh = {name: told[name] for name in names} | {"blocks": 0, "reused": 0}
        one = found.setdefault((told["model"], told["sample_digest"]), fresh)
        one["blocks"] += 1
        one["reused"] += receipt.reused
    return list(found.values())


def receipt_uri(output_uri: str, plan_digest: str, file_name: str) -> str:
    """Address of one receipt."""
    return f"{workspace_uri(output_uri, plan_digest)}/{file_name}.json"


def write_receipt(storage: Storage, output_uri: str, receipt: Receipt) -> None:
    """Record that a shard is published; written after the shard itself is visible."""
    uri = receipt_uri(output_uri, receipt.plan_digest, receipt.file_name)
    storage.write_bytes(uri, msgspec.json.encode(receipt))


def read_receipt(
    storage: Storage,
    output_uri: str,
    plan_digest: str,
    shard: Shard,
    variants: Sequence[str] = (),
) -> Receipt | None:
    """The receipt of a shard if it is published and its files are still those recorded.

    Args:
        storage: Where the output is.
        output_uri: The plan's.
        plan_digest: The plan's.
        shard: Of the plan.
        variants: Names of the plan's variants.
    """
    try:
        uri = receipt_uri(output_uri, plan_digest, shard.file_name)
        receipt = msgspec.json.decode(storage.read_bytes(uri, limit=_LIMIT), type=Receipt)
        uris = file_uris(output_uri, plan_digest, shard, variants)
        versions = tuple(storage.stat(uri).version for uri in uris)
    except StorageError as error:
        if error.code == "not_found":
            return None
        raise
    except msgspec.MsgspecError:
        return None
    if receipt.plan_digest != plan_digest or receipt.versions != versions:
        return None
    return receipt
