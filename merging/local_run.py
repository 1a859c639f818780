"""A whole merge in this process, by the same shard function that workers call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from merging.execute.shard import run_shard
from merging.execute.shard_run import ShardCounts
from merging.plan.plan import Plan
from merging.plan.stages import shards_left
from merging.publish import prepare_output, publish
from merging.receipts import Receipt, read_receipt
from merging.storage.base import Storage


def run_plan(
    plan: Plan,
    storage: Storage,
    *,
    device: str = "cpu",
    on_progress: Callable[[int, ShardCounts], None] | None = None,
    engine: Callable[..., Receipt] = run_shard,
) -> dict[str, Any]:
    """Run a plan shard by shard; shards that an interrupted run published are taken over.

    Args:
        plan: What to do.
        storage: Where inputs are and the output goes.
        device: Torch device that solves.
        on_progress: Called with the shard's index and its counts.
        engine: Produces a shard; called as :func:`merging.execute.shard.run_shard`.

    Returns:
        The merge report.

    Raises:
        MergeError: What went wrong; the output then holds no index.
    """
    prepare_output(plan, storage)
    digest = plan.digest
    found = {
        shard.index: read_receipt(storage, plan.output_uri, digest, shard, plan.variant_names)
        for shard in plan.shards
    }
    receipts = {index: receipt for index, receipt in found.items() if receipt is not None}
    for index in sorted(shards_left(plan, receipts)):
        versions = {index: receipt.versions for index, receipt in receipts.items()}
        receipts[index] = engine(
            plan.work(index, digest, versions),
            storage,
            device=device,
            on_progress=_with_index(on_progress, index),
        )
    return publish(plan, list(receipts.values()), storage)


def _with_index(
    on_progress: Callable[[int, ShardCounts], None] | None, index: int
) -> Callable[[ShardCounts], None] | None:
    if on_progress is None:
        return None
    return lambda counts: on_progress(index, counts)
