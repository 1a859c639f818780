"""How long storage takes to answer: the service itself, and the workers of its jobs."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Histogram

from merging.rates import storage_kind
from merging.storage.base import Storage
from merging.storage.timed import timed
from workers.messages import StorageTimes

_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60)


class StorageMetrics:
    """Times requests to storage.

    Args:
        registry: Where the histogram is kept.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._durations = Histogram(
            "mergeyard_storage_request_duration_seconds",
            "Requests to storage, of this process and of workers for its shards.",
            ["backend", "operation", "outcome"],
            registry=registry,
            buckets=_SECONDS,
        )

    def timed(self, storage: Storage) -> Storage:
        """The same storage, with its requests timed."""
        return timed(storage, self._note)

    def note_worker(self, times: Iterable[StorageTimes]) -> None:
        """What a worker brought home with a shard."""
        for kind in times:
            durations = self._durations.labels(kind.backend, kind.operation, kind.outcome)
            for seconds in kind.seconds:
                durations.observe(seconds)

    def _note(self, uri: str, operation: str, outcome: str, seconds: float) -> None:
        self._durations.labels(storage_kind(uri), operation, outcome).observe(seconds)
