"""The shards of one job in memory: which are ready, in flight and done."""

from __future__ import annotations

from collections.abc import Mapping

from merging.plan.plan import Plan
from merging.receipts import Receipt
from service.jobs.records import Progress, ShardCounts
from workers.messages import PoolEvent, ShardProgress


class ShardBoard:
    """Book-keeping of a job's shards. Knows neither store nor pool.

    Args:
        plan: The job's plan.
        receipts: Of shards that are published already.
        attempts: Earlier tries at each shard, so that a try has its own number.
    """

    def __init__(
        self, plan: Plan, receipts: Mapping[int, Receipt], attempts: Mapping[int, int]
    ) -> None:
        self.receipts = dict(receipts)
        self.in_flight: dict[int, int] = {}
        self._shards = plan.shards
        self._attempts = {shard.index: attempts.get(shard.index, 0) for shard in plan.shards}
        self._failures = dict.fromkeys(self._attempts, 0)
        self._ready_at = {
            shard.index: float("-inf") for shard in plan.shards if shard.index not in receipts
        }
        self._counts: dict[int, ShardProgress] = {}
        self._changed: set[int] = set()

    @property
    def is_done(self) -> bool:
        """All shards are published."""
        return len(self.receipts) == len(self._shards)

    def next_ready(self, now: float) -> int | None:
        """The first shard, in the plan's order, that can be handed out."""
        return min((i for i, ready_at in self._ready_at.items() if ready_at <= now), default=None)

    def hand_out(self, index: int) -> int:
        """A ready shard goes to the pool; returns the number of this try."""
        del self._ready_at[index]
        self._attempts[index] += 1
        self.in_flight[index] = self._attempts[index]
        return self._attempts[index]

    def give_back(self, index: int, ready_at: float) -> None:
        """The pool did not take it: ready again then, without counting as failed."""
        self._end_try(index)
        self._ready_at[index] = ready_at

    def is_current(self, event: PoolEvent) -> bool:
        """Whether an event concerns a try that is in flight."""
        return self.in_flight.get(event.shard_index) == event.attempt

    def note(self, event: ShardProgress) -> None:
        """A shard in flight got on."""
        self._counts[event.shard_index] = event
        self._changed.add(event.shard_index)

    def finish(self, index: int, receipt: Receipt) -> None:
        """A shard is published."""
        self._end_try(index)
        self.receipts[index] = receipt

    def failures(self, index: int) -> int:
        """How often a shard has failed under this runner."""
        return self._failures[index]

    def fail(self, index: int, ready_at: float | None) -> None:
        """A shard in flight failed; ready again then, or never."""
        self._end_try(index)
        self._failures[index] += 1
        if ready_at is not None:
            self._ready_at[index] = ready_at

    def _end_try(self, index: int) -> None:
        del self.in_flight[index]
        self._counts.pop(index, None)
        self._changed.discard(index)

    def progress(self) -> Progress:
        """How far the job is; shards in flight count with what they report."""
        done = [shard for shard in self._shards if shard.index in self.receipts]
        running = self._counts.values()
        return Progress(
            shards_done=len(done),
            shards_total=len(self._shards),
            bytes_done=sum(shard.bytes_read + shard.size for shard in done)
            + sum(counts.bytes_read + counts.bytes_written for counts in running),
            bytes_total=sum(shard.bytes_read + shard.size for shard in self._shards),
            tensors_done=sum(len(shard.problems) for shard in done)
            + sum(counts.tensors_written for counts in running),
            tensors_total=sum(len(shard.problems) for shard in self._shards),
        )

    def changes(self) -> list[ShardCounts]:
        """Counts of the shards in flight that got on since :meth:`forget_changes`."""
        changed = [self._counts[index] for index in sorted(self._changed)]
        return [
            ShardCounts(c.shard_index, c.tensors_fetched, c.tensors_solved, c.tensors_written)
            for c in changed
        ]

    def forget_changes(self) -> None:
        """The changes so far are recorded."""
        self._changed.clear()
