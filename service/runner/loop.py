"""The runner: claims jobs and drives them, all in one thread.

Any number of runners may share a job store. Nothing that matters is kept here: a runner that is
killed costs the shards that were in flight.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import UTC, datetime

import structlog

from merging.errors import MergeError
from merging.storage.base import Storage
from service.forecast import Forecast
from service.jobs.errors import IllegalTransitionError, StaleLeaseError, StoreUnavailableError
from service.jobs.store import JobStore
from service.runner.claim import Heartbeat, Lease, Monotonic
from service.runner.context import RunnerContext
from service.runner.drive import JobDriver
from service.runner.settings import RunnerSettings
from workers.messages import PoolEvent, ShardDone, ShardFailed, StorageTimes
from workers.pool import ShardPool

_POLL_SECONDS = 0.2
_BUSY_POLL_SECONDS = 0.02
"""While threads plan or publish: they do not wake the loop as the pool does."""

_MORE_THAN_SLOTS = 2
"""Shards in flight beyond the pool's slots: a worker's next one is there when it is done."""

Key = tuple[str, int]


def _now() -> datetime:
    return datetime.now(UTC)


class Runner:
    """Drives the jobs of a store on a pool.

    Args:
        store: Where jobs are.
        storage_factory: Opens the storage of one job.
        pool: Executes shards; used by this runner alone, and closed by whoever made it.
        settings: Limits and intervals.
        name: Of this runner, in leases; unique among all that share the store.
        clock: The time now.
        monotonic: Seconds that never go back.
        threads: For work that blocks; by default threads of its own.
        forecast: Told what receipts say of the workers' speed.
        note_storage: Told how long workers' requests to storage took.
    """

    def __init__(
        self,
        store: JobStore,
        storage_factory: Callable[[], Storage],
        pool: ShardPool,
        settings: RunnerSettings | None = None,
        *,
        name: str | None = None,
        clock: Callable[[], datetime] = _now,
        monotonic: Monotonic = time.monotonic,
        threads: Executor | None = None,
        forecast: Forecast | None = None,
        note_storage: Callable[[Sequence[StorageTimes]], None] | None = None,
    ) -> None:
        self._note_storage = note_storage
        self._settings = settings or RunnerSettings()
        self._name = name or f"{socket.gethostname()[:80]}-{secrets.token_hex(4)}"
        self._storage_factory = storage_factory
        self._threads = threads or ThreadPoolExecutor(
            self._settings.max_concurrent_jobs, thread_name_prefix="runner-work"
        )
        self._forecast = forecast or Forecast()
        self._context = RunnerContext(
            store, pool, self._threads, self._settings, clock, monotonic, self._forecast
        )
        self.heartbeat = Heartbeat(
            store,
            lease_seconds=self._settings.lease_seconds,
            interval_seconds=self._settings.heartbeat_seconds,
            monotonic=monotonic,
        )
        self._drivers: dict[str, JobDriver] = {}
        self._in_flight: dict[Key, JobDriver] = {}
        self._store_failures = 0
        self._store_away_until = float("-inf")
        self._claim_at = float("-inf")
        self._claim_overdue_at = float("-inf")
        self._dispatch_at = float("-inf")
        self._draining = threading.Event()
        self._aborting = threading.Event()
        self._thread = threading.Thread(target=self._run, name="runner", daemon=True)
        self._log = structlog.get_logger(__name__).bind(runner=self._name)

    @property
    def is_running(self) -> bool:
        """Its thread is alive: for readiness checks."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to claim and drive jobs."""
        self.heartbeat.start()
        self._thread.start()

    def stop(self, *, drain: bool = True, timeout_seconds: float = 60.0) -> None:
        """Stop. Jobs that are not at their end are given back, for other runners to continue.

        Args:
            drain: Let shards in flight finish; otherwise they are cancelled.
            timeout_seconds: How long to wait for that. A runner that ``is_running`` after it goes
                on stopping; it can be hurried by another call, or left to lapse.
        """
        self._draining.set()
        if not drain:
            self._aborting.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)
        if not self._thread.is_alive():
            self.heartbeat.stop()
            self._threads.shutdown(wait=False)

    # -- the loop

    def _run(self) -> None:
        self._log.info("runner_started")
        while not (self._draining.is_set() and not self._drivers):
            try:
                is_busy = any(driver.is_busy for driver in self._drivers.values())
                self.tick(_BUSY_POLL_SECONDS if is_busy else _POLL_SECONDS)
            except Exception:  # noqa: BLE001 - whatever it is, the other jobs must go on
                self._log.exception("runner_failed")
                time.sleep(_POLL_SECONDS)  # no busy loop around a lasting fault
        self._log.info("runner_stopped")

    def tick(self, poll_seconds: float) -> None:
        """One turn: take in what the pool says, claim, step every job, hand out shards."""
        for event in self._context.pool.poll(poll_seconds):
            self._route(event)
        if self._context.monotonic() < self._store_away_until:
            return
        if not self._draining.is_set():
            self._claim()
        for driver in list(self._drivers.values()):
            self._step(driver)
        if not self._draining.is_set():
            self._hand_out()

    def _route(self, event: PoolEvent) -> None:
        key = (event.job_id, event.shard_index)
        is_end = isinstance(event, (ShardDone, ShardFailed))
        driver = self._in_flight.pop(key, None) if is_end else self._in_flight.get(key)
        if isinstance(event, (ShardDone, ShardFailed)) and self._note_storage is not None:
            self._note_storage(event.storage)
        if driver is not None:
            driver.receive(event)

    def _claim(self) -> None:
        """Take jobs on, as many as are allowed; beyond that, those that only need to be failed."""
        now = self._context.monotonic()
        while True:
            is_full = len(self._drivers) >= self._settings.max_concurrent_jobs
            if now < (self._claim_overdue_at if is_full else self._claim_at):
                return
            try:
                lease = self.heartbeat.claim(self._name, overdue=is_full)
            except StoreUnavailableError as error:
                self._wait_for_store(error)
                return
            if lease is None and is_full:
                self._claim_overdue_at = now + self._settings.claim_seconds
            elif lease is None:
                self._claim_at = now + self._settings.claim_seconds
            if lease is None:
                return
            self._log.info("job_claimed", job_id=lease.claim.job_id, state=str(lease.job.state))
            self._add_driver(lease)

    def _add_driver(self, lease: Lease) -> None:
        driver = JobDriver(lease, self._storage_factory, self._context)
        last = self._drivers.get(driver.job_id)
        if last is not None:  # our own lease lapsed, and we were the first to notice
            last.abandon()
        self._drivers[driver.job_id] = driver

    def _step(self, driver: JobDriver) -> None:
        try:
            driver.step()
            if self._draining.is_set() and not driver.is_finished:
                self._park(driver)
            self._store_failures = 0
        except StoreUnavailableError as error:
            self._wait_for_store(error)
        except StaleLeaseError:
            self._log.warning("lease_lost", job_id=driver.job_id)
            driver.abandon()
        except IllegalTransitionError:
            # Somebody cancelled the job between our last look and this step: look, and go on.
            self._refresh(driver)
        except Exception as error:  # noqa: BLE001 - a fault of ours must cost this job alone
            self._log.exception("job_driver_failed", job_id=driver.job_id)
            self._give_up(driver, error)
        if driver.is_finished:
            self.heartbeat.drop(driver.lease)
            del self._drivers[driver.job_id]

    def _park(self, driver: JobDriver) -> None:
        """Give a job back once nothing of it is going on."""
        if driver.is_idle:
            driver.release()
        elif self._aborting.is_set():
            driver.stop_in_flight()

    def _refresh(self, driver: JobDriver) -> None:
        try:
            driver.lease.update(self._context.store.get(driver.job_id))
        except StoreUnavailableError as error:
            self._wait_for_store(error)

    def _give_up(self, driver: JobDriver, error: Exception) -> None:
        if driver.has_given_up:  # that failed as well: leave the job to lapse
            driver.abandon()
            return
        driver.give_up(
            MergeError(
                f"The service failed in a way that it should not ({type(error).__name__}). Its log"
                " has the details, under this job's id.",
                code="internal",
            )
        )

    def _wait_for_store(self, error: StoreUnavailableError) -> None:
        """Leave the store alone for a while; shards in flight go on meanwhile."""
        self._store_away_until = self._context.retry_at(self._store_failures)
        self._store_failures += 1
        self._log.warning("store_unavailable", detail=error.detail, failures=self._store_failures)

    # -- sharing out the pool

    def _hand_out(self) -> None:
        """Give the pool as much as it can use: equal shares to jobs of the same priority."""
        now = self._context.monotonic()
        if now < self._dispatch_at or not any(map(self._can_use, self._drivers.values())):
            return
        slots = self._context.pool.slots()
        self._forecast.note_slots(slots)
        limit = self._settings.max_in_flight_shards
        if limit is None:
            limit = max(slots, 1) + _MORE_THAN_SLOTS
        while len(self._in_flight) < limit:
            waiting = [driver for driver in self._drivers.values() if self._can_use(driver)]
            if not waiting:
                return
            driver = min(waiting, key=_need)
            task = driver.next_task()
            try:
                self._context.pool.submit(task)
            except MergeError as error:
                self._log.warning("pool_unavailable", detail=error.detail)
                driver.take_back(task)
                self._dispatch_at = self._context.retry_at(0)
                return
            self._in_flight[task.key] = driver

    def _can_use(self, driver: JobDriver) -> bool:
        """It has a shard to hand out, and the pool has none left of an earlier claim of the job."""
        left = any(
            key[0] == driver.job_id and other is not driver
            for key, other in self._in_flight.items()
        )
        return not left and driver.has_ready_shard()


def _need(driver: JobDriver) -> tuple[int, int, datetime]:
    """Who comes first: by priority, then least in flight, then age."""
    job = driver.lease.job
    return (-job.priority, driver.num_in_flight, job.queued_at)
