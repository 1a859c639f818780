"""What a runner shares with the drivers of its jobs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import datetime

from service.forecast import Forecast
from service.jobs.store import JobStore
from service.runner.claim import Monotonic
from service.runner.settings import RunnerSettings
from workers.pool import ShardPool

_LONGEST_WAIT_SECONDS = 60.0


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
        wait = min(self.settings.retry_seconds * 2.0**failures, _LONGEST_WAIT_SECONDS)
        return self.monotonic() + wait
