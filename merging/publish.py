"""Making a merged checkpoint appear: companions, card and report, and the index last.

``model.safetensors.index.json`` is the commit marker: readers find a complete checkpoint or none.
That of an adapter is ``adapter_config.json``.
A sweep is complete with its report, which is written after the indexes of all its checkpoints.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from merging.checkpoint.tokenizer_edit import EDITED, edit_tokenizer_file
from merging.checkpoint.vocabulary import MAX_TOKENIZER_BYTES
from merging.errors import CheckpointError, PlanError, StorageError
from merging.plan.chat_template import TEMPLATE_NAME
from merging.plan.outputs import Companion
from merging.plan.packing import data_bytes
from merging.plan.plan import WORKSPACE, Plan
from merging.receipts import Receipt
from merging.report import (
    CARD_NAME,
    REPORT_NAME,
    SWEEP_REPORT_NAME,
    build_report,
    model_card,
)
from merging.storage.base import Storage
from merging.verify import verify_output

INDEX_NAME = "model.safetensors.index.json"
ADAPTER_NAME = "adapter_config.json"
CONFIG_NAME = "config.json"


def prepare_output(plan: Plan, storage: Storage) -> None:
    """Make sure that the output may be written, before any work is done.

    An unfinished merge of ours (shards without an index) is continued or written over. With
    ``plan.overwrite`` the markers that make an older checkpoint loadable are removed first, so
    that no reader ever sees old and new files mixed.

    Raises:
        PlanError: ``output_exists``.
        StorageError: The output cannot be listed or written.
    """
    found = {uri: _markers(uri, storage) for uri in plan.checkpoint_uris}
    for output, markers in found.items():
        if markers and not plan.overwrite:
            raise PlanError(
                f"{output} already holds a checkpoint ({markers[0].rsplit('/', 1)[-1]})."
                " Choose another output, or allow it to be replaced with overwrite.",
                code="output_exists",
                context={"uri": output},
            )
    if plan.variants:
        storage.delete(f"{plan.output_uri}/{SWEEP_REPORT_NAME}")
    for output, markers in found.items():
        for uri in markers:
            storage.delete(uri)
        storage.write_bytes(f"{output}/{WORKSPACE}/in-progress", plan.digest.encode())


def _markers(output: str, storage: Storage) -> list[str]:
    """Files that make a checkpoint loadable."""
    return [
        item.uri
        for item in storage.list(output)
        if item.uri[len(output) + 1 :] in (INDEX_NAME, "model.safetensors", ADAPTER_NAME)
    ]


def publish(plan: Plan, receipts: Sequence[Receipt], storage: Storage) -> dict[str, Any]:
    """Complete a merge whose shards are all published; safe to repeat.

    The checkpoints of a sweep appear together, when all of them are verified: each with files of
    its own as of a merge by itself, and beside them a report on all.

    Args:
        plan: The plan.
        receipts: Of all shards of weights, in any order; of others as far as there are any.
        storage: Where the output is.

    Returns:
        The merge report (also stored as ``merge_report.json``), or that of the whole sweep
        (``sweep_report.json``).

    Raises:
        CheckpointError: A shard in storage is not what its receipt says.
        StorageError: Writing failed.
    """
    ordered = sorted(receipts, key=lambda receipt: receipt.shard_index)
    merges = plan.merges()
    for number, merge in enumerate(merges):
        verify_output(merge, [receipt.of_variant(number) for receipt in ordered], storage)
    report = build_report(plan, ordered)
    reports = report["variants"] if plan.variants else [report]
    for merge, own in zip(merges, reports, strict=True):
        _write_companions(merge, own, storage)
    for merge in merges:
        storage.write_bytes(f"{merge.output_uri}/{marker_name(merge)}", marker(merge))
    if plan.variants:
        storage.write_bytes(f"{plan.output_uri}/{SWEEP_REPORT_NAME}", _json(report))
    _clear(plan, storage)
    return report


def names_beside_weights(merge: Plan) -> list[str]:
    """What :func:`publish` writes beside the weights of a checkpoint, but for its index."""
    names = [companion.file_name for companion in merge.companions]
    if merge.chat_template is not None:
        names.append(TEMPLATE_NAME)
    if merge.config:
        names.append(CONFIG_NAME)
    return [*names, REPORT_NAME, CARD_NAME]


def _write_companions(merge: Plan, report: dict[str, Any], storage: Storage) -> None:
    """All that stands beside the weights of a checkpoint but its index."""
    output = merge.output_uri
    for companion in merge.companions:
        target = f"{output}/{companion.file_name}"
        if merge.added_tokens and companion.file_name in EDITED:
            storage.write_bytes(target, _with_tokens(merge, companion, storage))
        else:
            storage.copy(companion.source_uri, target, version=companion.version)
    if merge.chat_template is not None:
        storage.write_bytes(f"{output}/{TEMPLATE_NAME}", merge.chat_template.encode())
    if merge.config:
        storage.write_bytes(f"{output}/{CONFIG_NAME}", _json(merge.config))
    storage.write_bytes(f"{output}/{REPORT_NAME}", _json(report))
    storage.write_bytes(f"{output}/{CARD_NAME}", model_card(merge, report).encode())


def _with_tokens(merge: Plan, companion: Companion, storage: Storage) -> bytes:
    """A file of the tokenizer with the tokens that the merge adds."""
    uri = companion.source_uri
    data = storage.read_bytes(uri, limit=MAX_TOKENIZER_BYTES, version=companion.version)
    return edit_tokenizer_file(companion.file_name, data, uri, merge.added_tokens)


def find_published(plan: Plan, storage: Storage) -> dict[str, Any] | None:
    """The report, if exactly what this plan makes is already complete at its output.

    A process that died between publishing and recording it finds its work done; what it did not
    come to clear away is cleared away.
    """
    name = SWEEP_REPORT_NAME if plan.variants else REPORT_NAME
    try:
        for uri in plan.checkpoint_uris:
            storage.stat(f"{uri}/{marker_name(plan)}")
        report = read_report(storage, plan.output_uri, name)
    except StorageError as error:
        if error.code == "not_found":
            return None
        raise
    if report.get("plan_digest") != plan.digest:
        return None
    _clear(plan, storage)
    return report


def read_report(storage: Storage, output_uri: str, name: str = REPORT_NAME) -> dict[str, Any]:
    """The merge report of a published checkpoint, or that of a sweep.

    Raises:
        StorageError: It cannot be read (``not_found``: there is none).
        CheckpointError: ``index_inconsistent``: what is there is something else.
    """
    uri = f"{output_uri}/{name}"
    data = storage.read_bytes(uri, limit=256 << 20)
    try:
        report = json.loads(data)
    except ValueError:  # neither JSON nor text
        report = None
    if not isinstance(report, dict):
        raise CheckpointError(
            f"{uri} is not a merge report: it is no JSON object. Something else was put in its"
            " place; move it away, or choose another output.",
            code="index_inconsistent",
            context={"uri": uri},
        )
    return report


def marker_name(plan: Plan) -> str:
    """The file that is written last: of a checkpoint its index, of an adapter its config."""
    return INDEX_NAME if plan.adapter_config is None else ADAPTER_NAME


def marker(plan: Plan) -> bytes:
    """What is in it."""
    return weight_index(plan) if plan.adapter_config is None else _json(plan.adapter_config)


def weight_index(plan: Plan) -> bytes:
    """The index of a checkpoint, as it is published."""
    weight_map = {
        problem.tensor_name: shard.file_name for shard in plan.weights for problem in shard.problems
    }
    total = sum(data_bytes(problem) for shard in plan.weights for problem in shard.problems)
    return _json(
        {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
    )


def _clear(plan: Plan, storage: Storage) -> None:
    """Remove workspaces, and weight files of a checkpoint that this one replaced.

    What was merged is complete by now: what cannot be removed does it no harm.
    """
    ours = {shard.file_name for shard in plan.outputs}
    with contextlib.suppress(StorageError):
        for output in dict.fromkeys((*plan.checkpoint_uris, plan.output_uri)):
            replaces = plan.overwrite and output in plan.checkpoint_uris
            for item in storage.list(output):
                name = item.uri[len(output) + 1 :]
                stale = replaces and name.endswith(".safetensors") and "/" not in name
                if name.startswith(f"{WORKSPACE}/") or (stale and name not in ours):
                    storage.delete(item.uri)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
