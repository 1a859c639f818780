"""Telling how fast bytes move: the time in which any of several threads is moving some."""

from __future__ import annotations

import threading
import time


class BusyClock:
    """Counts the seconds in which at least one thread is inside; a context manager."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside = 0
        self._since = 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._since = time.perf_counter()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self.seconds += time.perf_counter() - self._since
