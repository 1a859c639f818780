"""How long storage takes to answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

from merging.errors import StorageError
from merging.storage.base import Storage

TimedRequest = Callable[[str, str, str, float], None]
"""``note(uri, operation, outcome, seconds)``, after each request; from any thread."""

_TIMED = ("stat", "list", "read_bytes", "read_into", "write_bytes", "copy", "delete")


def timed(storage: Storage, note: TimedRequest) -> Storage:
    """The same storage, with its requests timed; retries within one are part of its time.

    Streamed writes are not: they last as long as there is something to write.
    """
    return cast(Storage, _TimedStorage(storage, note))


class _TimedStorage:
    def __init__(self, storage: Storage, note: TimedRequest) -> None:
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
