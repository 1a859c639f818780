"""Trying again: bounded attempts with exponential backoff and full jitter.

Full jitter (each wait is uniform between zero and the exponential bound) keeps many workers that
were throttled together from coming back together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from secrets import SystemRandom
from typing import TypeVar

from merging.errors import StorageError

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long to try again.

    The defaults wait 13 s in the mean and 25 s at most over all attempts: long enough for a
    gateway that restarts, short enough that a lasting fault is reported.

    Attributes:
        max_attempts: Attempts in all, the first one included.
        base_seconds: Bound of the first wait; it doubles with each further one.
        cap_seconds: Largest bound of one wait.
        sleep: Waits for a number of seconds.
        jitter: Draws the wait from the bounds that it is given.
    """

    max_attempts: int = 8
    base_seconds: float = 0.2
    cap_seconds: float = 20.0
    sleep: Callable[[float], None] = time.sleep
    jitter: Callable[[float, float], float] = SystemRandom().uniform

    def run(self, attempt: Callable[[], Result]) -> Result:
        """Call ``attempt`` until it returns.

        Raises:
            StorageError: The first one that is not retryable, or the last one; its context says
                how many ``attempts`` were made.
        """
        for number in range(1, self.max_attempts):
            try:
                return attempt()
            except StorageError as error:
                if not error.retryable:
                    raise
                self.sleep(self.jitter(0.0, self._bound(number)))
        try:
            return attempt()
        except StorageError as error:
            error.context["attempts"] = self.max_attempts
            raise

    def _bound(self, attempts: int) -> float:
        """Longest wait after this many failed attempts, in seconds."""
        return min(self.cap_seconds, self.base_seconds * 2.0 ** (attempts - 1))
