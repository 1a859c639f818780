"""The shards of one job in memory: which are ready, in flight and done.

A shard is ready when the shards whose files it reads are done. What they made can get lost before
it is read: :meth:`ShardBoard.lose` has it made again.
"""

from __future__ import annotations

from collections.abc import Mapping

from merging.plan.plan import Plan
from merging.plan.stages import shards_left, shards_needed
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
        self._needed = shards_needed(plan)
        self._left = shards_left(plan, receipts)
        self._ready_at = dict.fromkeys(self._left, float("-inf"))
        self._versions: dict[int, dict[int, tuple[str, ...]]] = {}
        self._counts: dict[int, ShardProgress] = {}
        self._changed: set[int] = set()

    @property
    def is_done(self) -> bool:
        """All shards are published, but for those that nothing needs any more."""
        return not self._left

    def next_ready(self, now: float) -> int | None:
        """The first shard, in the plan's order, that can be handed out."""
        ready = (index for index, ready_at in self._ready_at.items() if ready_at <= now)
        return min((i for i in ready if self._needed[i].issubset(self.receipts)), default=None)

    def hand_out(self, index: int) -> int:
        """A ready shard goes to the pool; returns the number of this try."""
        del self._ready_at[index]
        self._attempts[index] += 1
        self.in_flight[index] = self._attempts[index]
        self._versions[index] = {i: self.receipts[i].versions for i in self._needed[index]}
        return self._attempts[index]

    def versions(self, index: int) -> dict[int, tuple[str, ...]]:
        """Versions of the files that a shard in flight needs of other shards."""
        return self._versions[index]

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
        self._left.discard(index)

    def fail(self, index: int, ready_at: float | None) -> None:
        """A shard in flight failed; ready again then, or never."""
        self._end_try(index)
        if ready_at is not None:
            self._ready_at[index] = ready_at

    def attempts(self, index: int) -> int:
        """Tries at a shard so far."""
        return self._attempts[index]

    def is_current_file(self, index: int, *, reader: int) -> bool:
        """Whether a shard in flight was handed out with the newest file of another one."""
        receipt = self.receipts.get(index)
        return receipt is not None and receipt.versions == self._versions[reader].get(index)

    def lose(self, index: int) -> None:
        """The file of a finished shard is gone, and is made again."""
        del self.receipts[index]
        self._left.add(index)
        self._ready_at[index] = float("-inf")

    def _end_try(self, index: int) -> None:
        del self.in_flight[index]
        del self._versions[index]
        self._counts.pop(index, None)
        self._changed.discard(index)

    def progress(self) -> Progress:
        """How far the job is; shards in flight count with what they report."""
        done = [shard for shard in self._shards if shard.index not in self._left]
        running = self._counts.values()
        return Progress(
            shards_done=len(done),
            shards_total=len(self._shards),
            bytes_done=sum(shard.bytes_read + shard.bytes_written for shard in done)
            + sum(counts.bytes_read + counts.bytes_written for counts in running),
            bytes_total=sum(shard.bytes_read + shard.bytes_written for shard in self._shards),
            tensors_done=sum(len(shard.problems) for shard in done if shard.is_output)
            + sum(c.tensors_written for c in running if self._shards[c.shard_index].is_output),
            tensors_total=sum(len(s.problems) for s in self._shards if s.is_output),
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
