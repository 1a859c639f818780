"""What a pool has handed out: the book-keeping that all pools share."""

from __future__ import annotations

import queue
from collections.abc import Iterable
from typing import TypeVar

import msgspec

from merging.errors import Cancelled, MergeError, WorkerError
from workers.messages import PoolEvent, ShardDone, ShardFailed, ShardTask

Item = TypeVar("Item")
Key = tuple[str, int]


class InFlight:
    """Tasks in flight; lets each end once, and drops what comes late. For one thread."""

    def __init__(self) -> None:
        self._tasks: dict[Key, ShardTask] = {}
        self._cancelled: set[Key] = set()

    def add(self, task: ShardTask) -> None:
        """Take in a task. Raises ``ValueError`` if the same shard is in flight already."""
        if task.key in self._tasks:
            raise ValueError(f"Shard {task.key[1]} of job {task.key[0]!r} is in flight already.")
        self._tasks[task.key] = task

    def cancel(self, job_id: str) -> list[Key]:
        """Note that a job's tasks shall stop; returns which they are."""
        keys = [key for key in self._tasks if key[0] == job_id]
        self._cancelled.update(keys)
        return keys

    def accept(self, event: PoolEvent) -> PoolEvent | None:
        """The event to pass on, or None if its task is not in flight (any more).

        A worker that is lost after its task was cancelled is what was asked for.
        """
        key = (event.job_id, event.shard_index)
        task = self._tasks.get(key)
        if task is None or task.attempt != event.attempt:
            return None
        if isinstance(event, (ShardDone, ShardFailed)):
            del self._tasks[key]
            is_cancelled = key in self._cancelled
            self._cancelled.discard(key)
            if (
                is_cancelled
                and isinstance(event, ShardFailed)
                and event.error["code"] == WorkerError.default_code
            ):
                return msgspec.structs.replace(event, error=cancelled_error().to_dict())
        return event

    def accept_all(self, events: Iterable[PoolEvent]) -> list[PoolEvent]:
        """:meth:`accept` for many."""
        return [kept for event in events if (kept := self.accept(event)) is not None]

    def fail_all(self, error: MergeError) -> list[PoolEvent]:
        """The end of everything in flight."""
        failures = [
            ShardFailed(task.job_id, task.work.shard.index, task.attempt, error.to_dict())
            for task in self._tasks.values()
        ]
        return self.accept_all(failures)


def cancelled_error() -> Cancelled:
    """What a cancelled task ends in."""
    return Cancelled("The shard was cancelled.")


def drain(source: queue.SimpleQueue[Item], timeout: float) -> list[Item]:
    """Wait up to ``timeout`` seconds for an item; it and all others that are there."""
    items: list[Item] = []
    try:
        items.append(source.get(timeout=timeout) if timeout > 0 else source.get_nowait())
        while True:
            items.append(source.get_nowait())
    except queue.Empty:
        return items
