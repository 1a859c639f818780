"""Removing what a merge that will not be continued has left at its output.

Only what the plan's own receipts prove to be ours is removed, and only as long as it is unchanged:
published shards, receipts, intermediate files, and writes that were broken off. A checkpoint that
is complete keeps all its files, whoever made it.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from merging.errors import StorageError
from merging.plan.plan import WORKSPACE, Plan, file_uri, workspace_uri
from merging.publish import INDEX_NAME
from merging.receipts import read_receipt
from merging.storage.base import Storage

_CLOCKS_DIFFER = timedelta(minutes=1)
"""How much the clocks of storage and of whoever noted the times may be apart."""


def collect(plan: Plan, storage: Storage, *, since: datetime, until: datetime) -> int:
    """Remove the remains of a merge; may be repeated.

    Args:
        plan: The merge. Nobody may be working on it, or on another one with the same output.
        storage: Where the output is.
        since: When work on it began.
        until: When work on it ended.

    Returns:
        How many objects and unfinished writes were removed.

    Raises:
        StorageError: Storage failed; what is left can be collected later.
    """
    output, digest = plan.output_uri, plan.digest
    workspace = workspace_uri(output, digest)
    span = {"since": since - _CLOCKS_DIFFER, "until": until + _CLOCKS_DIFFER}
    removed = 0
    for folder, shards in (
        (output, plan.outputs),
        (workspace, [shard for shard in plan.shards if not shard.is_output]),
    ):
        names = frozenset(shard.file_name for shard in shards)
        removed += storage.discard_unfinished(folder, names, **span)
    doomed = [item.uri for item in storage.list(workspace)]
    if doomed and not _exists(storage, f"{output}/{INDEX_NAME}"):
        # First, since they are known by the receipts in the workspace.
        doomed[:0] = [
            file_uri(output, digest, shard)
            for shard in plan.outputs
            if read_receipt(storage, output, digest, shard) is not None
        ]
    mark = f"{output}/{WORKSPACE}/in-progress"
    if _holds(storage, mark, digest.encode()):
        doomed.append(mark)
    for uri in doomed:
        storage.delete(uri)
    return removed + len(doomed)


def _exists(storage: Storage, uri: str) -> bool:
    try:
        storage.stat(uri)
    except StorageError as error:
        if error.code == "not_found":
            return False
        raise
    return True


def _holds(storage: Storage, uri: str, data: bytes) -> bool:
    try:
        return storage.read_bytes(uri, limit=len(data)) == data
    except StorageError as error:
        if error.code in ("not_found", "too_large"):
            return False
        raise
