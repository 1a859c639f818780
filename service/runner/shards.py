"""The shards of one job between pool and store: what the pool says is recorded and acted on."""

from __future__ import annotations

from collections import Counter, deque
from datetime import datetime, timedelta
from typing import Any

import msgspec
import structlog

from merging.errors import MergeError, error_from_dict
from merging.plan.plan import Plan, file_uris
from merging.receipts import Receipt
from service.jobs.records import EventType
from service.jobs.states import ShardState
from service.runner.board import ShardBoard
from service.runner.claim import Lease
from service.runner.context import RunnerContext
from workers.messages import (
    PoolEvent,
    ShardDone,
    ShardFailed,
    ShardLog,
    ShardProgress,
    ShardStarted,
    ShardTask,
)

_FILE_IS_GONE = ("not_found", "source_changed")
_TELLINGS = 500
"""One event of progress in this part of the time that the job has run: one in a second at first,
1,500 in an hour, 4,000 in a week."""


class ShardDesk:
    """Hands out shards and deals with what becomes of them.

    Attributes:
        board: Which shards are ready, in flight and done.
        has_started: A worker has taken up one of them.

    Args:
        plan: The job's plan.
        receipts: Of shards that are published already.
        attempts: Earlier tries at each shard.
        lease: Goes with every write.
        context: Store, settings and clocks.
    """

    def __init__(
        self,
        plan: Plan,
        receipts: dict[int, Receipt],
        attempts: dict[int, int],
        *,
        lease: Lease,
        context: RunnerContext,
    ) -> None:
        self.board = ShardBoard(plan, receipts, attempts)
        self._plan = plan
        self._plan_digest = plan.digest
        makers = {file.shard for file in plan.files if file.shard is not None}
        self._makers = {
            uri: index
            for index in makers
            for uri in file_uris(
                plan.output_uri, self._plan_digest, plan.shards[index], plan.variant_names
            )
        }
        self._lease = lease
        self._context = context
        self.has_started = False
        self._inbox: deque[ShardStarted | ShardLog | ShardDone | ShardFailed] = deque()
        self._failures: Counter[tuple[int, str]] = Counter()
        self._sampled_at = float("-inf")
        self._told_at = float("-inf")
        self._began_at = context.monotonic()
        self._began_bytes = self.board.progress().bytes_done

    @property
    def is_idle(self) -> bool:
        """Nothing is in flight, and nothing that the pool said is unrecorded."""
        return not (self.board.in_flight or self._inbox)

    def has_ready(self) -> bool:
        """Whether :meth:`next_task` would give one."""
        return self.board.next_ready(self._context.monotonic()) is not None

    def next_task(self) -> ShardTask:
        """The next ready shard, as a task for the pool."""
        index = self.board.next_ready(self._context.monotonic())
        assert index is not None
        attempt = self.board.hand_out(index)
        return ShardTask(
            job_id=self._lease.claim.job_id,
            attempt=attempt,
            work=self._plan.work(index, self._plan_digest, self.board.versions(index)),
            storage_roots=self._context.settings.storage_roots,
            device=self._context.settings.device,
            traceparent=self._lease.job.traceparent,
        )

    def take_back(self, task: ShardTask) -> None:
        """The pool could not take a task; no fault of the shard's."""
        self.board.give_back(task.work.shard.index, self._context.retry_at(0))

    def receive(self, event: PoolEvent) -> None:
        """Take in what the pool says; late words of earlier tries are dropped."""
        if not self.board.is_current(event):
            return
        if isinstance(event, ShardProgress):
            self.board.note(event)
        else:
            self._inbox.append(event)

    def read_inbox(self, *, is_ending: bool) -> MergeError | None:
        """Deal with what the pool said; each event stays until the store has taken it.

        Args:
            is_ending: The job is being stopped: failures are no news, and nothing is retried.

        Returns:
            The error that the job must fail with, if there is one.
        """
        while self._inbox:
            event = self._inbox[0]
            error = None
            if isinstance(event, ShardDone):
                self.record_published(event.receipt, event.attempt)
                self._context.forecast.note_rates(event.receipt.rates)
                self.board.finish(event.shard_index, event.receipt)
            elif isinstance(event, ShardStarted):
                self._record_start(event)
            elif isinstance(event, ShardLog):
                self._record_words(event)
            elif is_ending:
                self.board.fail(event.shard_index, None)
            else:
                error = self._deal_with_failure(event)
            self._inbox.popleft()
            if error is not None:
                return error
        return None

    def record_published(self, receipt: Receipt, attempt: int) -> None:
        """Tell the store that a shard is published."""
        summary = msgspec.to_builtins(receipt)
        for file in (summary, *summary["others"]):
            del file["problems"]  # figures per tensor are in the merge report
        del summary["rates"]
        summary["interference_removed"] = interference_removed(receipt)
        self._record(receipt.shard_index, ShardState.SUCCEEDED, attempt, receipt=summary)
        structlog.get_logger(__name__).info(
            "shard_done",
            job_id=self._lease.claim.job_id,
            shard_index=receipt.shard_index,
            attempt=attempt,
            bytes_read=receipt.bytes_read,
            bytes_written=receipt.bytes_written,
            duration_seconds=round(receipt.seconds.get("total", 0.0), 3),
            worker=receipt.worker,
            device=receipt.device,
        )

    def _record_start(self, event: ShardStarted) -> None:
        self._record(
            event.shard_index,
            ShardState.RUNNING,
            event.attempt,
            worker=event.worker,
            device=event.device,
        )
        self.has_started = True

    def _record_words(self, event: ShardLog) -> None:
        words = {
            "shard_index": event.shard_index,
            "attempt": event.attempt,
            "worker": event.worker,
            "text": event.text,
        }
        self._context.store.append_event(self._lease.claim, EventType.JOB_LOGGED, words)

    def _deal_with_failure(self, event: ShardFailed) -> MergeError | None:
        """Try a shard again if that may help; else give the error that the job fails with."""
        index = event.shard_index
        error = error_from_dict(event.error)
        error.context.setdefault("shard_index", index)
        missing = self._missing_file(error)
        kind = (index, error.code)
        ready_at = self._context.retry_of(
            error, self._failures[kind] + 1, may_help=missing is not None
        )
        is_last = ready_at is None
        state = ShardState.FAILED if is_last else ShardState.PENDING
        self._record(index, state, event.attempt, error=error.to_dict())
        if missing is not None and self.board.is_current_file(missing, reader=index):
            attempts = self.board.attempts(missing)
            self._record(missing, ShardState.PENDING, attempts, error=error.to_dict())
            self.board.lose(missing)
        self._failures[kind] += 1
        self.board.fail(index, ready_at)
        structlog.get_logger(__name__).warning(
            "shard_failed",
            job_id=event.job_id,
            shard_index=index,
            attempt=event.attempt,
            code=error.code,
            will_retry=not is_last,
        )
        return error if is_last else None

    def _missing_file(self, error: MergeError) -> int | None:
        """The shard whose file, read by others, is not as it was made, if that is the failure."""
        if error.code not in _FILE_IS_GONE:
            return None
        return self._makers.get(str(error.context.get("uri")))

    def _record(self, index: int, state: ShardState, attempt: int, **facts: Any) -> None:
        self._context.store.record_shard(self._lease.claim, index, state, attempt=attempt, **facts)

    def sample_progress(self) -> None:
        """Tell the store how far the job is, if it got on and the last time was long enough ago.

        Events of it become rarer the longer the job runs, so that a job of days does not fill the
        table; the figures that can be read of job and shards stay fresh.
        """
        now = self._context.monotonic()
        interval, is_done = self._context.settings.progress_seconds, self.board.is_done
        if now < self._sampled_at + interval and not is_done:
            return
        progress, changes = self.board.progress(), self.board.changes()
        if progress != self._lease.job.progress or changes:
            pause = max(interval, (now - self._began_at) / _TELLINGS)
            is_told = is_done or now >= self._told_at + pause
            job = self._context.store.update_progress(
                self._lease.claim,
                progress,
                shards=changes,
                estimated_finish_at=self._estimate(now),
                with_event=is_told,
            )
            self._lease.update(job)
            if is_told:
                self.board.forget_changes()
                self._told_at = now
        self._sampled_at = now

    def _estimate(self, now: float) -> datetime | None:
        """When the job will be done, at the rate of this runner so far."""
        progress = self.board.progress()
        gained = progress.bytes_done - self._began_bytes
        if gained <= 0 or now <= self._began_at:
            return None
        seconds_per_byte = (now - self._began_at) / gained
        left = (progress.bytes_total - progress.bytes_done) * seconds_per_byte
        return self._context.clock() + timedelta(seconds=left)


def interference_removed(receipt: Receipt) -> list[float | None]:
    """The one figure per tensor, in file order, that people watch while a merge runs."""
    shares = [problem.figures.get("interference_removed") for problem in receipt.problems]
    return [None if share is None else round(share, 4) for share in shares]
