"""Files that one merge leaves for others: statistics, under names that say what they are made from.

They lie in a folder of their own, outside of any output. Beside each stands a record, which is the
receipt of whoever made the file: what is measured is told by the file's name, and whether it is
whole by the digest in the record. So a file that lacks its record, or differs from it, is as good
as none: it is made again, and replaced.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Sequence
from datetime import UTC, datetime

import msgspec

from merging.errors import StorageError
from merging.plan.statistics_work import is_kept_name
from merging.receipts import Receipt
from merging.storage.base import ObjectStat, Storage

_RECORD = ".json"
_RECORD_LIMIT = 64 << 20
_READ_BYTES = 16 << 20


def write_record(storage: Storage, uri: str, receipt: Receipt) -> None:
    """Record what a kept file is; written once the file itself is visible."""
    storage.write_bytes(_record_uri(uri), msgspec.json.encode(receipt))


def find_kept(storage: Storage, uri: str) -> Receipt | None:
    """The record of a file that is whole, every byte of which is read for that; else None.

    The version in it is the one that was looked at, also of a file that was copied here.

    Raises:
        StorageError: Storage failed.
    """
    try:
        stat = storage.stat(uri)
        data = storage.read_bytes(_record_uri(uri), limit=_RECORD_LIMIT)
        record = msgspec.json.decode(data, type=Receipt)
        is_whole = record.size == stat.size and record.sha256 == file_digest(storage, stat)
    except StorageError as error:
        if error.code in ("not_found", "source_changed"):
            return None
        raise
    except msgspec.MsgspecError:
        return None
    return msgspec.structs.replace(record, version=stat.version) if is_whole else None


def list_kept(storage: Storage, folder: str) -> list[str]:
    """Names of the kept files and records in a folder; files of other names are not ours."""
    names = [item.uri[len(folder) + 1 :] for item in storage.list(folder)]
    return [name for name in names if _is_ours(name)]


def remove_kept(
    storage: Storage, folder: str, found: Sequence[str], in_use: Container[str], before: datetime
) -> int:
    """Remove what is kept in a folder and not in use.

    Args:
        storage: Where it is.
        folder: Its address.
        found: From :func:`list_kept`, before it was asked what is in use.
        in_use: Names of files that are not to be removed.
        before: Writes that were begun before that, and never ended, are given up.

    Returns:
        How many objects and unfinished writes were removed.

    Raises:
        StorageError: Storage failed; what is left can be removed later.
    """
    doomed = [name for name in found if name.removesuffix(_RECORD) not in in_use]
    for name in sorted(doomed, key=lambda name: not name.endswith(_RECORD)):  # records first
        storage.delete(f"{folder}/{name}")
    early = datetime(1970, 1, 1, tzinfo=UTC)
    unfinished = storage.discard_unfinished(folder, _KeptNames(), since=early, until=before)
    return len(doomed) + unfinished


def file_digest(storage: Storage, stat: ObjectStat) -> str:
    """SHA-256 of a whole file at the version that was seen, in hex."""
    digest = hashlib.sha256()
    buffer = bytearray(min(_READ_BYTES, stat.size))
    for start in range(0, stat.size, _READ_BYTES):
        part = memoryview(buffer)[: min(_READ_BYTES, stat.size - start)]
        storage.read_into(stat.uri, start, part, version=stat.version)
        digest.update(part)
    return digest.hexdigest()


class _KeptNames:
    """All names that kept files have."""

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _is_ours(name)


def _is_ours(name: str) -> bool:
    """Whether it is the name of a kept file, or of its record."""
    return is_kept_name(name.removesuffix(_RECORD))


def _record_uri(uri: str) -> str:
    return f"{uri}{_RECORD}"
