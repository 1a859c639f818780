"""Checking a merged checkpoint against its plan, by reading it again."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from merging.checkpoint.documents import shorten_all
from merging.checkpoint.header import read_header
from merging.checkpoint.index import WeightFile
from merging.errors import CheckpointError, StorageError
from merging.kept import file_digest
from merging.plan.plan import Plan, Shard
from merging.receipts import Receipt
from merging.report import REPORT_NAME, SWEEP_REPORT_NAME
from merging.storage.base import ObjectStat, Storage

_REPORT_LIMIT_BYTES = 256 << 20
_REPORTS = {SWEEP_REPORT_NAME: 2, REPORT_NAME: 1}
"""Names of reports, with the parts of the file names in them."""


class WrittenFile(msgspec.Struct, frozen=True):
    """A weight file as a merge report tells of it."""

    name: str
    size: int
    sha256: str


class _Output(msgspec.Struct):
    files: tuple[WrittenFile, ...]


class _Report(msgspec.Struct):
    output: _Output


def verify_published(checkpoint_uri: str, storage: Storage) -> tuple[WrittenFile, ...]:
    """Read a published checkpoint again, wherever it is now, and compare it with its merge report.

    Args:
        checkpoint_uri: Its folder, or that of a sweep, whose checkpoints are then all read.
        storage: Where that is.

    Returns:
        The weight files, every byte of which is as it was written.

    Raises:
        CheckpointError: ``missing_file``: no merge report is there, or none that can be read;
            ``digest_mismatch``, naming the file.
        StorageError: Something cannot be read.
    """
    uri = storage.normalise(checkpoint_uri)
    files = _read_report(uri, storage).output.files
    for written in files:
        stat = storage.stat(f"{uri}/{written.name}")
        found = file_digest(storage, stat)
        if found != written.sha256:
            raise CheckpointError(
                f"{stat.uri} ({stat.size} bytes) reads back with SHA-256 {found}; the merge report"
                f" says {written.sha256} ({written.size} bytes). It was changed or damaged: copy"
                " it again from where it is whole, or merge again.",
                code="digest_mismatch",
                context={"uri": stat.uri},
            )
    return files


def _read_report(uri: str, storage: Storage) -> _Report:
    name, reason = REPORT_NAME, "is not there"
    for name, depth in _REPORTS.items():
        try:
            data = storage.read_bytes(f"{uri}/{name}", limit=_REPORT_LIMIT_BYTES)
            report = msgspec.json.decode(data, type=_Report)
        except StorageError as error:
            if error.code != "not_found":
                raise
            continue
        except msgspec.MsgspecError as error:
            reason = f"cannot be read ({error})"
            break
        paths = [file.name.split("/") for file in report.output.files]
        strange = ["/".join(path) for path in paths if len(path) != depth or ".." in path]
        if not strange:
            return report
        reason = f"names files in other folders ({shorten_all(strange)})"
        break
    report_uri = f"{uri}/{name}"
    raise CheckpointError(
        f"{report_uri} {reason}: only a checkpoint that Mergeyard published can be verified.",
        code="missing_file",
        context={"uri": report_uri},
    )


def verify_output(
    plan: Plan, receipts: Sequence[Receipt], storage: Storage, *, read_weights: bool = False
) -> None:
    """Check every shard file: version, size and header against plan and receipt.

    Args:
        plan: What was to be written.
        receipts: One per shard of weights, in order; those of other shards are not looked at.
        storage: Where the output is.
        read_weights: Also read every byte back and compare SHA-256 digests. Storage checks what it
            receives, so this is for those who do not trust it.

    Raises:
        CheckpointError: ``digest_mismatch`` or ``missing_file``, naming the file.
    """
    outputs = plan.outputs
    written = [receipt for receipt in receipts if plan.shards[receipt.shard_index].is_output]
    if [receipt.shard_index for receipt in written] != [shard.index for shard in outputs]:
        raise CheckpointError(
            f"The plan has {len(outputs)} files of weights but there are receipts for"
            f" {sorted(receipt.file_name for receipt in written)}.",
            code="missing_file",
        )
    for shard, receipt in zip(outputs, written, strict=True):
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
            _compare_digest(stat, receipt, storage)


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


def _compare_digest(stat: ObjectStat, receipt: Receipt, storage: Storage) -> None:
    found = file_digest(storage, stat)
    if found != receipt.sha256:
        raise CheckpointError(
            f"{stat.uri} reads back with SHA-256 {found}, written was {receipt.sha256}. The storage"
            " damaged it; run the merge again.",
            code="digest_mismatch",
            context={"uri": stat.uri},
        )
