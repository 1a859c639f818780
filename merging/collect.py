"""Removing what a merge that will not be continued has left at its output.

Only what the plan's own receipts prove to be ours is removed, and only as long as it is unchanged:
published shards, receipts, intermediate files, and writes that were broken off. A checkpoint that
is complete keeps all its files, whoever made it.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime, timedelta

from merging.errors import StorageError
from merging.plan.plan import WORKSPACE, Plan, file_uri, file_uris, workspace_uri
from merging.publish import marker_name
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
        How many objects and unfinished writes were removed. Folders that hold nothing then are
        removed too.

    Raises:
        StorageError: Storage failed; what is left can be collected later.
    """
    output, digest = plan.output_uri, plan.digest
    workspace = workspace_uri(output, digest)
    span = {"since": since - _CLOCKS_DIFFER, "until": until + _CLOCKS_DIFFER}
    names: defaultdict[str, set[str]] = defaultdict(set)
    for shard in plan.shards:
        for uri in file_uris(output, digest, shard, plan.variant_names):
            if not shard.folder:
                names[uri.rpartition("/")[0]].add(shard.file_name)
    removed = sum(
        storage.discard_unfinished(folder, found, **span) for folder, found in names.items()
    )
    doomed = [item.uri for item in storage.list(workspace)]
    if doomed:
        # First, since they are known by the receipts in the workspace.
        doomed[:0] = _published(plan, digest, storage)
    marks = [f"{folder}/{WORKSPACE}/in-progress" for folder in plan.checkpoint_uris]
    doomed += [mark for mark in marks if _holds(storage, mark, digest.encode())]
    for uri in doomed:
        storage.delete(uri)
    for folder in (*plan.checkpoint_uris, output):
        storage.remove_folder(folder)
    return removed + len(doomed)


def _published(plan: Plan, digest: str, storage: Storage) -> list[str]:
    """Weight files that are still as this plan's receipts say, but of complete checkpoints."""
    unfinished = [
        folder
        for folder in plan.checkpoint_uris
        if not _exists(storage, f"{folder}/{marker_name(plan)}")
    ]
    if not unfinished:
        return []
    names = plan.variant_names
    return [
        file_uri(folder, digest, shard)
        for shard in plan.outputs
        if read_receipt(storage, plan.output_uri, digest, shard, names) is not None
        for folder in unfinished
    ]


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
