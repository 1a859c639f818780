"""The seam between the runner and whatever executes shards."""

from __future__ import annotations

from typing import Protocol

from workers.messages import PoolEvent, ShardTask


class ShardPool(Protocol):
    """Executes shard tasks. Used by one runner thread.

    A submitted task ends in exactly one ``ShardDone`` or ``ShardFailed`` (a cancelled one in
    ``ShardFailed`` with code ``cancelled``); a lost worker is ``ShardFailed`` with the retryable
    code ``worker_lost``. The pool does not retry: the runner decides, records, and submits anew.
    """

    def slots(self) -> int:
        """Tasks that can run at once now; the runner keeps a few more than that in flight."""

    def submit(self, task: ShardTask) -> None:
        """Hand over a task."""

    def poll(self, timeout: float) -> list[PoolEvent]:
        """Wait up to ``timeout`` seconds for events; all that have come, oldest first."""

    def cancel(self, job_id: str, *, now: bool = False) -> None:
        """Stop a job's tasks: orderly (uploads aborted), or at once by ending the process."""

    def close(self) -> None:
        """Let go of everything; tasks in flight are cancelled."""
