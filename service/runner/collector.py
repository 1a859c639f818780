"""Removing what jobs have left in storage that nobody needs, some time after they ended."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from merging.collect import collect
from merging.errors import MergeError
from merging.kept import list_kept, remove_kept
from merging.storage.base import Storage
from service.jobs.records import Leftover
from service.jobs.store import Leftovers

_LEASE_SECONDS = 600.0
"""How long one removal may take; jobs with the same output wait until it is done."""

_LONGEST_PAUSE_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class KeptStatistics:
    """Where statistics are kept for other jobs, and how long after the last one that used them."""

    folder: str
    kept_seconds: float


class Collector:
    """Looks for leftovers now and then; any number of them may share a store.

    Args:
        store: Where leftovers are noted.
        storage_factory: Opens the storage that they lie in.
        kept_seconds: How long they are kept for a retry to go on from.
        statistics: Where statistics are kept for other jobs, if they are.
    """

    def __init__(
        self,
        store: Leftovers,
        storage_factory: Callable[[], Storage],
        *,
        kept_seconds: float,
        statistics: KeptStatistics | None = None,
    ) -> None:
        self._store = store
        self._storage_factory = storage_factory
        self._kept_seconds = kept_seconds
        self._statistics = statistics
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)
        self._log = structlog.get_logger(__name__)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Do not begin another removal; one that goes on is done again by whoever comes next."""
        self._stop.set()

    def collect_all(self) -> None:
        """Remove everything that is due. What fails is left for the next time."""
        last: Leftover | None = None
        while not self._stop.is_set():
            last = self._store.take_leftover(self._kept_seconds, _LEASE_SECONDS, after=last)
            if last is None:
                return
            self._store.end_collection(last, is_gone=self._collect(last))

    def collect_statistics(self) -> None:
        """Remove what is kept of statistics and no job has used for long."""
        if self._statistics is None:
            return
        storage, folder = self._storage_factory(), self._statistics.folder
        try:
            found = list_kept(storage, folder)
            in_use = self._store.kept_in_use(self._statistics.kept_seconds)
            count = remove_kept(storage, folder, found, in_use.names, in_use.before)
        except MergeError as error:
            self._log.warning("statistics_not_removed", code=error.code, detail=error.detail)
        else:
            if count:
                self._log.info("statistics_removed", objects=count)

    def _collect(self, leftover: Leftover) -> bool:
        log = self._log.bind(job_id=leftover.job_id, attempt=leftover.attempt)
        try:
            count = collect(
                leftover.plan,
                self._storage_factory(),
                since=leftover.began_at,
                until=leftover.ended_at,
            )
        except MergeError as error:
            log.warning("leftovers_not_removed", code=error.code, detail=error.detail)
            return False
        log.info("leftovers_removed", objects=count)
        return True

    def _run(self) -> None:
        shortest = self._kept_seconds
        if self._statistics is not None:
            shortest = min(shortest, self._statistics.kept_seconds)
        pause = min(max(shortest / 10, 1.0), _LONGEST_PAUSE_SECONDS)
        while not self._stop.wait(pause):
            try:
                self.collect_all()
                self.collect_statistics()
            except Exception:  # noqa: BLE001 - another day; nothing else depends on it
                self._log.exception("collector_failed")
