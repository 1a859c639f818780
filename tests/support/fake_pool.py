"""A pool without workers, for tests of the runner: does at once what its script says.

A task that succeeds reads what it would read (so that changed sources are noticed) and publishes a
valid file of zeros with its receipt.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from merging.errors import Cancelled, MergeError, WorkerError
from merging.plan.packing import shard_header
from merging.receipts import OtherFile, Receipt, write_receipt
from merging.storage.base import Storage
from workers.messages import (
    PoolEvent,
    ShardDone,
    ShardFailed,
    ShardProgress,
    ShardStarted,
    ShardTask,
)

Outcome = MergeError | None
Script = Callable[[ShardTask], Outcome]


class FakePool:
    """A :class:`workers.pool.ShardPool` that runs tasks while it is polled.

    Args:
        storage: Where tasks read and publish.
        slots: Tasks that run at once.
        script: Gives the error that a task ends in, or None for success.

    Attributes:
        holding: Tasks start but do not end, until this is unset.
        stubborn: Workers do not heed an orderly cancel.
        refusing: ``submit`` fails, as while Ray is out of reach.
        submitted: All tasks so far.
        cancels: All calls of ``cancel``: job and ``now``.
    """

    def __init__(
        self, storage: Storage, *, slots: int = 2, script: Script = lambda _task: None
    ) -> None:
        self.script = script
        self.holding = False
        self.stubborn = False
        self.refusing = False
        self.submitted: list[ShardTask] = []
        self.cancels: list[tuple[str, bool]] = []
        self._storage = storage
        self._slots = slots
        self._tasks: dict[tuple[str, int], ShardTask] = {}
        self._started: set[tuple[str, int]] = set()
        self._events: list[PoolEvent] = []
        self._changed = threading.Condition()

    @property
    def in_flight(self) -> list[ShardTask]:
        """Tasks that have not ended."""
        return list(self._tasks.values())

    def indexes(self, job_id: str) -> list[int]:
        """Shards of a job that were submitted, in order."""
        return [task.work.shard.index for task in self.submitted if task.job_id == job_id]

    def slots(self) -> int:
        """See :meth:`workers.pool.ShardPool.slots`."""
        return self._slots

    def submit(self, task: ShardTask) -> None:
        """See :meth:`workers.pool.ShardPool.submit`."""
        if self.refusing:
            raise WorkerError("There are no workers.", retryable=True)
        assert task.key not in self._tasks, "a shard is in flight twice"
        self.submitted.append(task)
        self._tasks[task.key] = task
        with self._changed:
            self._changed.notify()

    def poll(self, timeout: float) -> list[PoolEvent]:
        """See :meth:`workers.pool.ShardPool.poll`."""
        for task in self.in_flight[: self._slots]:
            self._work_on(task)
        with self._changed:
            if not self._events and timeout:
                self._changed.wait(timeout)
        events, self._events = self._events, []
        return events

    def cancel(self, job_id: str, *, now: bool = False) -> None:
        """See :meth:`workers.pool.ShardPool.cancel`."""
        self.cancels.append((job_id, now))
        if now or not self.stubborn:
            self.fail_all(Cancelled("The shard was cancelled."), job_id)

    def close(self) -> None:
        """See :meth:`workers.pool.ShardPool.close`."""
        self.fail_all(Cancelled("The pool was closed."))

    def fail_all(self, error: MergeError, job_id: str | None = None) -> None:
        """Everything in flight ends in this error."""
        for task in self.in_flight:
            if job_id in (None, task.job_id):
                self._end(task, error)

    def report_progress(self, task: ShardTask, tensors: int) -> None:
        """A task has come as far as that many tensors."""
        done = task.work.shard.problems[:tensors]
        self._events.append(
            ShardProgress(
                task.job_id,
                task.work.shard.index,
                task.attempt,
                tensors_fetched=tensors,
                tensors_solved=tensors,
                tensors_written=tensors,
                bytes_read=sum(problem.bytes_read for problem in done),
                bytes_written=0,
            )
        )

    def _work_on(self, task: ShardTask) -> None:
        if task.key not in self._started:
            self._started.add(task.key)
            index = task.work.shard.index
            self._events.append(ShardStarted(task.job_id, index, task.attempt, "worker-1", "cpu"))
        if not self.holding:
            self._end(task, self.script(task))

    def _end(self, task: ShardTask, error: Outcome) -> None:
        del self._tasks[task.key]
        self._started.discard(task.key)
        index = task.work.shard.index
        event: PoolEvent
        try:
            if error is not None:
                raise error
            event = ShardDone(task.job_id, index, task.attempt, self._publish(task))
        except MergeError as failure:
            event = ShardFailed(task.job_id, index, task.attempt, failure.to_dict())
        self._events.append(event)

    def _publish(self, task: ShardTask) -> Receipt:
        work = task.work
        for problem in work.shard.problems:
            for source in (problem.base, *problem.experts):
                if source is not None:
                    file = work.files[source.file]
                    buffer = memoryview(bytearray(source.num_bytes))
                    self._storage.read_into(file.uri, source.start, buffer, version=file.version)
        header = shard_header(work.shard.problems)
        data = header + bytes(work.shard.size - len(header))
        stat, *others = [self._storage.write_bytes(uri, data) for uri in work.file_uris]
        sha256 = f"{work.shard.index:064x}"
        receipt = Receipt(
            plan_digest=work.plan_digest,
            shard_index=work.shard.index,
            file_name=work.shard.file_name,
            size=work.shard.size,
            sha256=sha256,
            version=stat.version,
            bytes_read=work.shard.bytes_read,
            read_requests=1,
            peak_buffer_bytes=1,
            seconds={"total": 1.0},
            device="cpu",
            worker="worker-1",
            problems=(),
            others=tuple(OtherFile(stat.size, sha256, stat.version, ()) for stat in others),
        )
        write_receipt(self._storage, work.output_uri, receipt)
        return receipt
