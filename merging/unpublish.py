"""Taking a published checkpoint away again: what its merge wrote, and only while it is still that.

Everything is checked before anything is removed. Then the index goes first, so that no reader ever
finds a part of a checkpoint, and the merge report last: as long as it is there, it shows whose the
rest is, and a removal that was broken off can be done again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merging.errors import CheckpointError, StorageError
from merging.plan.plan import Plan
from merging.publish import marker, marker_name, names_beside_weights, read_report
from merging.report import REPORT_NAME, SWEEP_REPORT_NAME
from merging.storage.base import Storage


def unpublish(plan: Plan, report: Mapping[str, Any], storage: Storage) -> int:
    """Remove the checkpoint of a merge, or those of a sweep; may be repeated.

    Args:
        plan: The merge. Nobody may be working on its output.
        report: What :func:`merging.publish.publish` returned.
        storage: Where the output is.

    Returns:
        How many files were removed; 0 if nothing was there any more. Folders that hold nothing
        then are removed too.

    Raises:
        StorageError: ``output_changed`` if what is there is not what this merge published: nothing
            is removed then. Others if storage failed: what is left can be removed later.
    """
    found = {item.uri: item.size for item in storage.list(plan.output_uri)}
    sweep_report = f"{plan.output_uri}/{SWEEP_REPORT_NAME}"
    first: list[str] = []
    if plan.variants and sweep_report in found:
        _check_report(plan.output_uri, SWEEP_REPORT_NAME, report, storage)
        first.append(sweep_report)
    then: list[str] = []
    last: list[str] = []
    folders = {plan.output_uri}
    reports = report["variants"] if plan.variants else [report]
    for merge, own in zip(plan.merges(), reports, strict=True):
        output = merge.output_uri
        weights = [f"{output}/{file['name']}" for file in own["output"]["files"]]
        rest = [f"{output}/{name}" for name in names_beside_weights(merge)]
        index, own_report = f"{output}/{marker_name(merge)}", f"{output}/{REPORT_NAME}"
        folders.update(uri.rpartition("/")[0] for uri in rest)
        if not any(uri in found for uri in (index, own_report, *weights)):
            continue
        _check_checkpoint(merge, own, found, storage)
        first.append(index)
        then += [*weights, *(uri for uri in rest if uri != own_report)]
        last.append(own_report)
    doomed = [uri for uri in (*first, *then, *last) if uri in found]
    for uri in doomed:
        storage.delete(uri)
    for folder in sorted(folders, key=len, reverse=True):  # what is in a folder before it
        storage.remove_folder(folder)
    return len(doomed)


def _check_checkpoint(
    merge: Plan, report: Mapping[str, Any], found: Mapping[str, int], storage: Storage
) -> None:
    """Raise unless everything that is there and shows whose it is says that it is this merge's."""
    output = merge.output_uri
    if f"{output}/{REPORT_NAME}" not in found:
        raise _changed(output, REPORT_NAME, "is not there, so that nothing says whose the rest is")
    _check_report(output, REPORT_NAME, report, storage)
    for file in report["output"]["files"]:
        if found.get(f"{output}/{file['name']}", file["size"]) != file["size"]:
            raise _changed(output, file["name"], "has another size")
    index = f"{output}/{marker_name(merge)}"
    expected = marker(merge)
    if index in found and (
        found[index] != len(expected) or storage.read_bytes(index, limit=len(expected)) != expected
    ):
        raise _changed(output, marker_name(merge), "names other tensors or files")


def _check_report(output: str, name: str, report: Mapping[str, Any], storage: Storage) -> None:
    try:
        stored = read_report(storage, output, name)
        is_same = stored["plan_digest"] == report["plan_digest"] and (
            stored["output"]["digest"] == report["output"]["digest"]
        )
    except (CheckpointError, KeyError, TypeError):
        is_same = False
    if not is_same:
        raise _changed(output, name, "is that of another merge")


def _changed(output: str, name: str, what: str) -> StorageError:
    return StorageError(
        f"What is at {output} is no longer what the merge published there: {name} {what}. Nothing"
        " was removed; look at it, and remove by hand what is not wanted.",
        code="output_changed",
        context={"uri": f"{output}/{name}"},
    )
