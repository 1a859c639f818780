"""The steps of a job that block; run in threads, they write nothing to the job store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from merging.options import MergeOptions
from merging.plan.plan import Plan, workspace_uri
from merging.plan.planner import make_plan
from merging.publish import find_published, prepare_output, publish
from merging.receipts import Receipt, read_receipt, receipt_uri
from merging.recipe import parse_recipe
from merging.storage.base import Storage
from service.jobs.records import JobRecord
from service.jobs.states import JobState
from service.jobs.store import JobStore
from service.pinned import check_pinned


@dataclass(frozen=True, slots=True)
class Remains:
    """What an earlier runner, or an earlier attempt, left of a job.

    Attributes:
        receipts: Of published shards, by index.
        report: The merge report, if the output was completed and only the store did not hear of it.
    """

    receipts: dict[int, Receipt]
    report: dict[str, Any] | None = None


def load_or_make_plan(store: JobStore, job: JobRecord, storage: Storage) -> Plan:
    """The job's plan: the stored one if there is one, so that a take-over changes nothing."""
    plan = store.load_plan(job.id)
    if plan is not None:
        return plan
    options = MergeOptions.model_validate(job.options)
    plan = make_plan(parse_recipe(job.recipe_source), storage, options, job.output_uri)
    if job.pinned_plan_digest is not None:
        check_pinned(plan, job.pinned_plan_digest, job.inputs)
    return plan


def prepare(plan: Plan, job: JobRecord, storage: Storage) -> Remains:
    """Make the output ready for a new attempt, or find what is there of an interrupted one."""
    is_taken_over = job.state != JobState.PLANNING
    if not is_taken_over:
        prepare_output(plan, storage)
    receipts = find_receipts(plan, storage)
    if is_taken_over and len(receipts) < len(plan.shards):
        return Remains(receipts, find_published(plan, storage))
    return Remains(receipts)


def find_receipts(plan: Plan, storage: Storage) -> dict[int, Receipt]:
    """Receipts of the shards of this very plan whose files are still as they were written."""
    digest = plan.digest
    present = {item.uri for item in storage.list(workspace_uri(plan.output_uri, digest))}
    found = {
        shard.index: read_receipt(storage, plan.output_uri, digest, shard, plan.variant_names)
        for shard in plan.shards
        if receipt_uri(plan.output_uri, digest, shard.file_name) in present
    }
    return {index: receipt for index, receipt in found.items() if receipt is not None}


def publish_output(plan: Plan, receipts: dict[int, Receipt], storage: Storage) -> dict[str, Any]:
    """Complete and verify the output; returns the merge report."""
    return publish(plan, list(receipts.values()), storage)
