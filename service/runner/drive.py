"""One job, from its claim to its end.

A driver is a small state machine that the runner's loop turns: each stage is a method that is
called again and again until it enters the next one. Whatever a stage does to the store comes before
it changes its own memory, and can be repeated: when the store is away, the error passes through and
the same step is taken again later. Blocking work (planning, publishing) runs in threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import structlog

from merging.errors import MergeError
from merging.plan.plan import Plan
from merging.storage.base import Storage
from service.jobs.errors import StaleLeaseError, StoreError
from service.jobs.records import JobRecord
from service.jobs.states import JobState, ShardState
from service.problems import problem_from_error
from service.runner import steps
from service.runner.background import Background
from service.runner.claim import Lease
from service.runner.context import RunnerContext
from service.runner.shards import ShardDesk
from workers.messages import PoolEvent, ShardTask

Result = TypeVar("Result")


class JobDriver:
    """Drives one claimed job.

    Args:
        lease: The claim that it works under.
        open_storage: Opens the storage that the job may use.
        context: What the runner shares with all its drivers.

    Attributes:
        lease: The claim that it works under.
        is_finished: Nothing is left to do: drop it.
    """

    def __init__(
        self, lease: Lease, open_storage: Callable[[], Storage], context: RunnerContext
    ) -> None:
        self.lease = lease
        self.is_finished = False
        self._context = context
        self._store = context.store
        self._open_storage = open_storage
        self._stage: Callable[[], None] = self._make_plan
        self._planning = Background(self._load_or_make_plan, context)
        self._preparing = Background(self._prepare_output, context)
        self._publishing = Background(self._publish_output, context)
        self._desk: ShardDesk | None = None
        self._error: MergeError | None = None
        self._asked_to_stop_at: float | None = None
        self._check_takeovers()

    @property
    def job_id(self) -> str:
        """Whose driver it is."""
        return self.lease.claim.job_id

    @property
    def num_in_flight(self) -> int:
        """Shards that the pool has of it."""
        return len(self._desk.board.in_flight) if self._desk else 0

    @property
    def is_idle(self) -> bool:
        """Nothing of it is going on right now, so that it can be given back without loss."""
        is_working = self._is_blocked or not (self._desk is None or self._desk.is_idle)
        return not is_working and self._stage != self._end

    @property
    def is_busy(self) -> bool:
        """It may have something to do before the pool says anything."""
        waits_for_shards = self._stage == self._run or self.num_in_flight > 0
        return self._is_blocked or not waits_for_shards

    # -- what the loop does with it

    def receive(self, event: PoolEvent) -> None:
        """Take in what the pool says; it is dealt with in the next step."""
        if self._desk is not None:
            self._desk.receive(event)

    def step(self) -> None:
        """Do what can be done now.

        Raises:
            StoreError: The step was not completed; ``StaleLeaseError`` means that it never will be.
        """
        if self.lease.is_lost(self._context.monotonic()):
            raise StaleLeaseError(f"The lease of job {self.job_id} was not renewed in time.")
        if self._desk is not None:
            error = self._desk.read_inbox(is_ending=self._stage == self._end)
            if error is not None:
                self.give_up(error)
        if self._stage != self._end:
            self._heed_wishes()
        self._stage()

    def has_ready_shard(self) -> bool:
        """Whether :meth:`next_task` would give one."""
        return self._stage == self._run and self._desk is not None and self._desk.has_ready()

    def next_task(self) -> ShardTask:
        """A ready shard for the pool; only after :meth:`has_ready_shard`."""
        assert self._desk is not None
        return self._desk.next_task()

    def take_back(self, task: ShardTask) -> None:
        """The pool could not take a task."""
        assert self._desk is not None
        self._desk.take_back(task)

    @property
    def has_given_up(self) -> bool:
        """The job is to fail."""
        return self._error is not None

    def give_up(self, error: MergeError) -> None:
        """Let the job fail; what is in flight is ended first."""
        self._error = self._error or error
        self._begin_end(now=False)

    def stop_in_flight(self) -> None:
        """Have the pool drop what it has of the job, so that it can be given back soon."""
        if self._asked_to_stop_at is None:
            self._stop_pool(now=False)

    def release(self) -> None:
        """Give the job back as it stands, for another runner."""
        self._store.release(self.lease.claim)
        self.is_finished = True

    def abandon(self) -> None:
        """Stop without another word: the job is somebody else's."""
        self._begin_end(now=False)
        self.is_finished = True

    # -- stages

    def _make_plan(self) -> None:
        if self.lease.job.plan_digest is None:
            self._set_phase("reading_headers")
        plan = self._poll(self._planning)
        if plan is not None:
            phase = "checking_output"
            self.lease.update(self._store.save_plan(self.lease.claim, plan, phase=phase))
            self._enter(self._prepare, phase)

    def _prepare(self) -> None:
        remains = self._poll(self._preparing)
        if remains is None:
            return
        rows = self._store.shards(self.job_id)
        attempts = {row.index: row.attempt for row in rows}
        plan, receipts = self._plan, remains.receipts
        desk = ShardDesk(plan, receipts, attempts, lease=self.lease, context=self._context)
        for row in rows:
            receipt = receipts.get(row.index)
            if receipt is not None and row.state != ShardState.SUCCEEDED:
                desk.record_published(receipt, max(row.attempt, 1))
        if remains.report is not None:
            self._succeed(remains.report)
            return
        self._go_on(JobState.PLANNING, JobState.RUNNING, phase="waiting_for_workers")
        self._desk = desk
        self._stage = self._run

    def _run(self) -> None:
        assert self._desk is not None
        self._desk.sample_progress()
        if self._desk.board.is_done:
            self._go_on(JobState.RUNNING, JobState.PUBLISHING, phase="publishing")
            self._stage = self._publish
        elif self._desk.has_started:
            self._set_phase("merging")

    def _publish(self) -> None:
        report = self._poll(self._publishing)
        if report is not None:
            self._succeed(report)

    def _end(self) -> None:
        """Wait until nothing is in flight, then fail the job or call it cancelled.

        A terminal job writes nothing any more: hence the wait. Publishing cannot be interrupted;
        if it got through, the job has succeeded, whatever was wished meanwhile.
        """
        if self.num_in_flight:
            self._press()
        elif self._is_blocked:
            pass
        elif self._publishing.result is not None:
            self._succeed(self._publishing.result)
        elif self.lease.job.state == JobState.CANCELLING:
            self._finish(JobState.CANCELLED)
        else:
            assert self._error is not None
            self._finish(JobState.FAILED, error=problem_from_error(self._error))

    # -- what blocks, in threads

    def _load_or_make_plan(self) -> Plan:
        return steps.load_or_make_plan(self._store, self.lease.job, self._storage)

    def _prepare_output(self) -> steps.Remains:
        return steps.prepare(self._plan, self.lease.job, self._storage)

    def _publish_output(self) -> dict[str, Any]:
        assert self._desk is not None
        return steps.publish_output(self._plan, self._desk.board.receipts, self._storage)

    @functools.cached_property
    def _storage(self) -> Storage:
        return self._open_storage()

    @property
    def _is_blocked(self) -> bool:
        work = (self._planning, self._preparing, self._publishing)
        return any(background.is_running for background in work)

    @property
    def _plan(self) -> Plan:
        plan = self._planning.result
        assert plan is not None
        return plan

    def _poll(self, background: Background[Result]) -> Result | None:
        try:
            return background.poll()
        except StoreError:
            raise
        except MergeError as error:
            self.give_up(error)
            return None

    # -- what stages are made of

    def _enter(self, stage: Callable[[], None], phase: str) -> None:
        self._set_phase(phase)
        self._stage = stage

    def _set_phase(self, name: str) -> None:
        if self.lease.job.phase != name:
            self.lease.update(self._store.set_phase(self.lease.claim, name))

    def _go_on(self, old: JobState, new: JobState, *, phase: str) -> None:
        """Change the state, unless that happened already or a cancel came first."""
        if self.lease.job.state == old:
            self.lease.update(self._store.transition(self.lease.claim, new, phase=phase))
        self._set_phase(phase)

    def _succeed(self, report: dict[str, Any]) -> None:
        self._finish(JobState.SUCCEEDED, output=report["output"], report=report)

    def _finish(self, state: JobState, **facts: Any) -> None:
        self.lease.update(self._store.transition(self.lease.claim, state, **facts))
        self.is_finished = True
        structlog.get_logger(__name__).info(
            "job_finished", job_id=self.job_id, attempt=self.lease.job.attempt, state=str(state)
        )

    # -- how it ends early

    def _check_takeovers(self) -> None:
        times = self.lease.job.takeovers
        if times > self._context.settings.max_takeovers:
            self.give_up(
                MergeError(
                    f"{times} runners in a row stopped while they worked on this job, without any"
                    " progress between them. See their logs; memory is the likely reason.",
                    code="runner_lost",
                )
            )

    def _heed_wishes(self) -> None:
        job = self.lease.job
        if job.state == JobState.CANCELLING and not self._may_be_published(job):
            self._begin_end(now=job.cancel_requested == "now")
        elif self.lease.is_overdue(self._context.monotonic()):
            self.give_up(
                MergeError(
                    f"The job was not finished within {job.deadline_seconds:g} seconds of being"
                    " queued. Allow more time, or add workers.",
                    code="deadline_exceeded",
                )
            )

    def _may_be_published(self, job: JobRecord) -> bool:
        """Taken over from a runner that may have completed the output before it stopped."""
        return self._desk is None and 0 < job.progress.shards_total == job.progress.shards_done

    def _begin_end(self, *, now: bool) -> None:
        self._stop_pool(now=now)
        self._stage = self._end

    def _stop_pool(self, *, now: bool) -> None:
        if self.num_in_flight:
            self._context.pool.cancel(self.job_id, now=now)
        self._asked_to_stop_at = None if now else self._context.monotonic()

    def _press(self) -> None:
        """End workers that were asked to stop, if that is wished or they take too long."""
        if self._asked_to_stop_at is None:
            return
        limit = self._asked_to_stop_at + self._context.settings.grace_seconds
        if self._context.monotonic() >= limit or self.lease.job.cancel_requested == "now":
            self._stop_pool(now=True)
