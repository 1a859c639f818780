"""A pool of threads in this process: for laptops and tests, without Ray."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

from workers.in_flight import InFlight, Key, cancelled_error, drain
from workers.messages import PoolEvent, ShardDone, ShardFailed, ShardTask
from workers.shard_task import ENGINE, finish_task


class LocalPool:
    """A :class:`workers.pool.ShardPool` on threads.

    A thread cannot be ended from outside: ``cancel(now=True)`` is as orderly as without it, and
    takes effect before the task's next piece.

    Args:
        num_workers: Shards worked on at once.
        engine: Dotted path of the function that produces a shard.
    """

    def __init__(self, num_workers: int = 1, *, engine: str = ENGINE) -> None:
        self._num_workers = num_workers
        self._engine = engine
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="shard")
        self._events: queue.SimpleQueue[PoolEvent] = queue.SimpleQueue()
        self._in_flight = InFlight()
        self._stops: dict[Key, threading.Event] = {}

    def slots(self) -> int:
        """See :meth:`workers.pool.ShardPool.slots`."""
        return self._num_workers

    def submit(self, task: ShardTask) -> None:
        """See :meth:`workers.pool.ShardPool.submit`."""
        self._in_flight.add(task)
        stop = self._stops[task.key] = threading.Event()
        self._threads.submit(self._run, task, stop)

    def poll(self, timeout: float) -> list[PoolEvent]:
        """See :meth:`workers.pool.ShardPool.poll`."""
        events = self._in_flight.accept_all(drain(self._events, timeout))
        for event in events:
            if isinstance(event, (ShardDone, ShardFailed)):
                del self._stops[event.job_id, event.shard_index]
        return events

    def cancel(self, job_id: str, *, now: bool = False) -> None:  # noqa: ARG002 - see the class
        """See :meth:`workers.pool.ShardPool.cancel`."""
        for key in self._in_flight.cancel(job_id):
            self._stops[key].set()

    def close(self) -> None:
        """See :meth:`workers.pool.ShardPool.close`; the ends of tasks can still be polled."""
        for stop in self._stops.values():
            stop.set()
        self._threads.shutdown()

    def _run(self, task: ShardTask, stop: threading.Event) -> None:
        if stop.is_set():
            error = cancelled_error().to_dict()
            self._events.put(ShardFailed(task.job_id, task.work.shard.index, task.attempt, error))
            return
        self._events.put(finish_task(task, self._events.put, stop.is_set, engine=self._engine))
