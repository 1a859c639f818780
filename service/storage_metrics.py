"""How long storage takes to answer the service itself: planning, checking, publishing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

from prometheus_client import CollectorRegistry, Histogram

from merging.errors import StorageError
from merging.rates import storage_kind
from merging.storage.base import Storage

_TIMED = ("stat", "list", "read_bytes", "read_into", "write_bytes", "copy", "delete")
_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60)


class StorageMetrics:
    """Times requests to storage; retries within one are part of its time.

    Args:
        registry: Where the histogram is kept.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._durations = Histogram(
            "mergeyard_storage_request_duration_seconds",
            "Requests of this process to storage; workers' are in the merge report.",
            ["backend", "operation", "outcome"],
            registry=registry,
            buckets=_SECONDS,
        )

    def timed(self, storage: Storage) -> Storage:
        """The same storage, with its requests timed."""
        return cast(Storage, _TimedStorage(storage, self._note))

    def _note(self, uri: str, operation: str, outcome: str, seconds: float) -> None:
        self._durations.labels(storage_kind(uri), operation, outcome).observe(seconds)


class _TimedStorage:
    def __init__(self, storage: Storage, note: Callable[[str, str, str, float], None]) -> None:
        self._storage = storage
        self._note = note

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._storage, name)
        if name not in _TIMED:
            return method

        def call(uri: str, *args: Any, **kwargs: Any) -> Any:
            begin, outcome = time.perf_counter(), "ok"
            try:
                return method(uri, *args, **kwargs)
            except StorageError as error:
                outcome = error.code
                raise
            finally:
                self._note(uri, name, outcome, time.perf_counter() - begin)

        return call
