"""Making a merged checkpoint appear: companions, card and report, and the index last.

``model.safetensors.index.json`` is the commit marker: readers find a complete checkpoint or none.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from merging.errors import PlanError, StorageError
from merging.plan.packing import data_bytes
from merging.plan.plan import WORKSPACE, Plan
from merging.receipts import Receipt
from merging.report import CARD_NAME, REPORT_NAME, build_report, model_card
from merging.storage.base import Storage
from merging.verify import verify_output

INDEX_NAME = "model.safetensors.index.json"


def prepare_output(plan: Plan, storage: Storage) -> None:
    """Make sure that the output may be written, before any work is done.

    An unfinished merge of ours (shards without an index) is continued or written over. With
    ``plan.overwrite`` the markers that make an older checkpoint loadable are removed first, so
    that no reader ever sees old and new files mixed.

    Raises:
        PlanError: ``output_exists``.
        StorageError: The output cannot be listed or written.
    """
    output = plan.output_uri
    markers = [
        item.uri
        for item in storage.list(output)
        if "/" not in (name := item.uri[len(output) + 1 :])
        and (name == INDEX_NAME or name == "model.safetensors")
    ]
    if markers and not plan.overwrite:
        raise PlanError(
            f"{output} already holds a checkpoint ({markers[0].rsplit('/', 1)[-1]})."
            " Choose another output, or allow it to be replaced with overwrite.",
            code="output_exists",
            context={"uri": output},
        )
    for uri in markers:
        storage.delete(uri)
    storage.write_bytes(f"{output}/{WORKSPACE}/in-progress", plan.digest.encode())


def publish(plan: Plan, receipts: Sequence[Receipt], storage: Storage) -> dict[str, Any]:
    """Complete a merge whose shards are all published; safe to repeat.

    Args:
        plan: The plan.
        receipts: Of all shards of weights, in any order; of others as far as there are any.
        storage: Where the output is.

    Returns:
        The merge report (also stored as ``merge_report.json``).

    Raises:
        CheckpointError: A shard in storage is not what its receipt says.
        StorageError: Writing failed.
    """
    ordered = sorted(receipts, key=lambda receipt: receipt.shard_index)
    verify_output(plan, ordered, storage)
    output = plan.output_uri
    for companion in plan.companions:
        storage.copy(
            companion.source_uri, f"{output}/{companion.file_name}", version=companion.version
        )
    if plan.config:
        storage.write_bytes(f"{output}/config.json", _json(plan.config))
    report = build_report(plan, ordered)
    storage.write_bytes(f"{output}/{REPORT_NAME}", _json(report))
    storage.write_bytes(f"{output}/{CARD_NAME}", model_card(plan, report).encode())
    storage.write_bytes(f"{output}/{INDEX_NAME}", _json(_weight_index(plan)))
    _sweep(plan, storage)
    return report


def find_published(plan: Plan, storage: Storage) -> dict[str, Any] | None:
    """The report, if exactly this plan's checkpoint is already complete at its output.

    A process that died between publishing and recording it finds its work done; what it did not
    come to sweep is swept.
    """
    try:
        storage.stat(f"{plan.output_uri}/{INDEX_NAME}")
        report = read_report(storage, plan.output_uri)
    except StorageError as error:
        if error.code == "not_found":
            return None
        raise
    if report.get("plan_digest") != plan.digest:
        return None
    _sweep(plan, storage)
    return report


def read_report(storage: Storage, output_uri: str) -> dict[str, Any]:
    """The merge report of a published checkpoint."""
    data = storage.read_bytes(f"{output_uri}/{REPORT_NAME}", limit=256 << 20)
    report = json.loads(data)
    if not isinstance(report, dict):
        raise StorageError(f"{output_uri}/{REPORT_NAME} is not a merge report.", code="not_found")
    return report


def _weight_index(plan: Plan) -> dict[str, Any]:
    weight_map = {
        problem.tensor_name: shard.file_name for shard in plan.outputs for problem in shard.problems
    }
    total = sum(data_bytes(problem) for shard in plan.outputs for problem in shard.problems)
    return {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }


def _sweep(plan: Plan, storage: Storage) -> None:
    """Remove the workspace, and weight files of a checkpoint that this one replaced.

    The checkpoint is complete by now: what cannot be removed does it no harm.
    """
    ours = {shard.file_name for shard in plan.outputs}
    with contextlib.suppress(StorageError):
        for item in storage.list(plan.output_uri):
            name = item.uri[len(plan.output_uri) + 1 :]
            stale = plan.overwrite and name.endswith(".safetensors") and "/" not in name
            if name.startswith(f"{WORKSPACE}/") or (stale and name not in ours):
                storage.delete(item.uri)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
