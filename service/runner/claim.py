"""Leases: kept alive by a thread of their own, however busy the runner is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import structlog

from service.jobs.errors import StaleLeaseError, StoreUnavailableError
from service.jobs.records import Claim, JobRecord
from service.jobs.store import JobStore

Monotonic = Callable[[], float]
"""Seconds that never go back."""


_SECOND = timedelta(seconds=1)


class Lease:
    """A claim on a job, and the newest that is known of the job.

    Times are those of this process's monotonic clock: no clock that people set is asked.

    Args:
        claim: The claim.
        claimed_at: When it was asked for.
        lapses_at: When it ends, unless it is renewed.

    Attributes:
        claim: Goes with every write.
        job: The job as the store last gave it.
    """

    def __init__(self, claim: Claim, claimed_at: float, lapses_at: float) -> None:
        self.claim = claim
        self.job = claim.job
        self._queued_at = claimed_at - (claim.claimed_at - claim.job.queued_at) / _SECOND
        self._lapses_at = lapses_at
        self._lock = threading.Lock()

    def update(self, job: JobRecord) -> None:
        """Take in what the store gave; answers may overtake each other."""
        with self._lock:
            if job.revision >= self.job.revision:
                self.job = job

    def extend(self, lapses_at: float) -> None:
        """It was renewed."""
        self._lapses_at = lapses_at

    def lose(self) -> None:
        """It is known to have ended."""
        self._lapses_at = float("-inf")

    def is_overdue(self, now: float) -> bool:
        """The job's deadline has passed."""
        limit = self.job.deadline_seconds
        return limit is not None and now >= self._queued_at + limit

    def is_lost(self, now: float) -> bool:
        """It ended, or was not renewed in time: another runner may hold the job.

        With the store out of reach this cannot be known. Going on would risk writing to an output
        that was cancelled and given to another job, so the answer is yes.
        """
        return now >= self._lapses_at


class Heartbeat:
    """Renews leases.

    Args:
        store: Where they are.
        lease_seconds: For how long.
        interval_seconds: Between renewals.
        monotonic: For telling when a lease has lapsed; the store's clock may be another one's.
    """

    def __init__(
        self,
        store: JobStore,
        *,
        lease_seconds: float,
        interval_seconds: float,
        monotonic: Monotonic,
    ) -> None:
        self._store = store
        self._lease_seconds = lease_seconds
        self._interval_seconds = interval_seconds
        self._monotonic = monotonic
        self._leases: dict[str, Lease] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to renew."""
        self._thread.start()

    def stop(self) -> None:
        """Renew no more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def claim(self, owner: str, *, overdue: bool = False) -> Lease | None:
        """Claim a job, and keep it until it is dropped; ``overdue``: one past its deadline."""
        asked_at = self._monotonic()
        claim = self._store.claim(owner, self._lease_seconds, overdue=overdue)
        if claim is None:
            return None
        lease = Lease(claim, asked_at, asked_at + self._lease_seconds)
        self._leases[claim.job_id] = lease
        return lease

    def drop(self, lease: Lease) -> None:
        """Renew it no more."""
        self._leases.pop(lease.claim.job_id, None)

    def beat(self) -> None:
        """Renew all leases once."""
        for lease in list(self._leases.values()):
            asked_at = self._monotonic()
            try:
                lease.update(self._store.renew(lease.claim, self._lease_seconds))
            except StaleLeaseError:
                # Or the job has just ended: then its driver is done and does not look.
                lease.lose()
            except StoreUnavailableError:
                return  # the next beat tries again; what lapses meanwhile is lost
            else:
                lease.extend(asked_at + self._lease_seconds)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_seconds):
            try:
                self.beat()
            except Exception:  # noqa: BLE001 - a thread that ends silently would cost every lease
                structlog.get_logger(__name__).exception("heartbeat_failed")
