"""What one token may take of one controller, so that there is something left for the others.

Each replica counts for itself: with three of them a token may do three times as much. Used from
the event loop only.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from service.problems import RequestError

_RESERVE_SECONDS = 2.0
_MANY_TOKENS = 10_000


class RateLimit:
    """Requests per second and token, with as much in reserve as two seconds give.

    The generic cell rate algorithm: one number a token, the time at which its reserve is full
    again.

    Args:
        per_second: How many, in the long run.
        monotonic: Seconds that never go back.
    """

    def __init__(self, per_second: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._interval = 1 / per_second
        self._monotonic = monotonic
        self._full_at: dict[str, float] = {}

    def admit(self, token_id: str) -> None:
        """Count a request; raises ``rate_limited`` if it is one too many."""
        now = self._monotonic()
        full_at = max(self._full_at.get(token_id, now), now) + self._interval
        if full_at - now > max(_RESERVE_SECONDS, self._interval):
            raise RequestError(
                f"This token may make {1 / self._interval:g} requests a second; wait a moment.",
                code="rate_limited",
                retryable=True,
            )
        if len(self._full_at) > _MANY_TOKENS:
            self._full_at = {key: at for key, at in self._full_at.items() if at > now}
        self._full_at[token_id] = full_at


class StreamSlots:
    """Streams that one token may have open."""

    def __init__(self, per_token: int) -> None:
        self._per_token = per_token
        self._open: Counter[str] = Counter()

    @contextmanager
    def hold(self, token_id: str) -> Iterator[None]:
        """One more stream while the context lasts; raises ``rate_limited`` if it is too many."""
        if self._open[token_id] >= self._per_token:
            raise RequestError(
                f"This token has {self._per_token} streams open, which is all that it may have."
                " Close one, or follow several jobs with one client that polls.",
                code="rate_limited",
                retryable=True,
            )
        self._open[token_id] += 1
        try:
            yield
        finally:
            self._open[token_id] -= 1
            if not self._open[token_id]:
                del self._open[token_id]
