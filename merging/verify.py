"""Checking a merged checkpoint against its plan, by reading it again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from merging.checkpoint.header import read_header
from merging.checkpoint.index import WeightFile
from merging.errors import CheckpointError
from merging.plan.plan import Plan, Shard
from merging.receipts import Receipt
from merging.storage.base import Storage

_READ_BYTES = 16 << 20


def verify_output(
    plan: Plan, receipts: Sequence[Receipt], storage: Storage, *, read_weights: bool = False
) -> None:
    """Check every shard file: version, size and header against plan and receipt.

    Args:
        plan: What was to be written.
        receipts: One per shard, in order.
        storage: Where the output is.
        read_weights: Also read every byte back and compare SHA-256 digests. Storage checks what it
            receives, so this is for those who do not trust it.

    Raises:
        CheckpointError: ``digest_mismatch`` or ``missing_file``, naming the file.
    """
    if [receipt.shard_index for receipt in receipts] != [shard.index for shard in plan.shards]:
        raise CheckpointError(
            f"The plan has {len(plan.shards)} shards but there are receipts for"
            f" {sorted(receipt.shard_index for receipt in receipts)}.",
            code="missing_file",
        )
    for shard, receipt in zip(plan.shards, receipts, strict=True):
        uri = f"{plan.output_uri}/{shard.file_name}"
        stat = storage.stat(uri)
        if stat.version != receipt.version or stat.size != shard.size:
            raise CheckpointError(
                f"{uri} was changed after it was written (size {stat.size}, planned {shard.size})."
                " Something else writes to this output: choose another one and merge again.",
                code="digest_mismatch",
                context={"uri": uri},
            )
        file = WeightFile(stat.uri, stat.size, stat.version)
        _compare_header(shard, file, storage)
        if read_weights:
            _compare_digest(file, receipt, storage)


def _compare_header(shard: Shard, file: WeightFile, storage: Storage) -> None:
    found = [
        (entry.name, entry.dtype, tuple(entry.shape))
        for entry in read_header(storage, file).entries
    ]
    planned = [(p.tensor_name, p.dtype, tuple(p.shape)) for p in shard.problems]
    if found != planned:
        raise CheckpointError(
            f"The header of {file.uri} does not describe the tensors of its plan.",
            code="digest_mismatch",
            context={"uri": file.uri},
        )


def _compare_digest(file: WeightFile, receipt: Receipt, storage: Storage) -> None:
    digest = hashlib.sha256()
    buffer = bytearray(min(_READ_BYTES, file.size))
    for start in range(0, file.size, _READ_BYTES):
        part = memoryview(buffer)[: min(_READ_BYTES, file.size - start)]
        storage.read_into(file.uri, start, part, version=file.version)
        digest.update(part)
    if digest.hexdigest() != receipt.sha256:
        raise CheckpointError(
            f"{file.uri} reads back with SHA-256 {digest.hexdigest()}, written was"
            f" {receipt.sha256}. The storage damaged it; run the merge again.",
            code="digest_mismatch",
            context={"uri": file.uri},
        )
