"""What a runner shares with the drivers of its jobs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import datetime

from merging.errors import MergeError
from service.forecast import Forecast
from service.jobs.store import JobStore
from service.runner.claim import Monotonic
from service.runner.retry import backoff, is_worth_retrying, wait_before_retry
from service.runner.settings import RunnerSettings
from workers.pool import ShardPool


@dataclass(frozen=True, slots=True)
class RunnerContext:
    """Store, pool, threads for blocking work, settings, clocks, and what is known of workers."""

    store: JobStore
    pool: ShardPool
    threads: Executor
    settings: RunnerSettings
    clock: Callable[[], datetime]
    monotonic: Monotonic
    forecast: Forecast

    def retry_at(self, failures: int) -> float:
        """When to try again what has failed so often before: later each time."""
        return self.monotonic() + backoff(failures, self.settings.retry_seconds)

    def retry_of(self, error: MergeError, failures: int, *, may_help: bool = False) -> float | None:
        """When to try again what has failed in this way so often; None: not at all.

        ``may_help``: another try may succeed although the error itself does not say so.
        """
        if not (may_help or is_worth_retrying(error)):
            return None
        wait = wait_before_retry(
            error.code,
            failures,
            max_tries=self.settings.max_tries,
            retry_seconds=self.settings.retry_seconds,
        )
        return None if wait is None else self.monotonic() + wait
