"""What one token or address may take of one controller, so that something is left for the others.

Each replica counts for itself: with three of them a token may do three times as much. Used from
the event loop only, but for :class:`FailedLogins`.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from service.problems import RequestError

_RESERVE_SECONDS = 2.0
_MANY_TOKENS = 10_000
_MOST_ADDRESSES = 10_000
_RESERVE_OF_FAILURES_SECONDS = 60.0


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


class FailedLogins:
    """Tries with tokens, cookies or codes that were no good, by the address of the client.

    An address that has used up a minute's worth is refused before anything is looked up, until some
    time has passed. What was good lately still is: whoever shares an address with a guesser (that
    of a proxy, say) goes on working.

    Args:
        per_minute: How many, in the long run.
        monotonic: Seconds that never go back.
    """

    def __init__(self, per_minute: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._interval = 60 / per_minute
        self._monotonic = monotonic
        self._full_at: OrderedDict[str, float] = OrderedDict()
        self._good: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, address: str, credential: str = "") -> None:
        """Raise ``too_many_failures`` if the address may not try this credential now."""
        with self._lock:
            ahead = self._full_at.get(address, 0.0) - self._monotonic()
            if ahead + self._interval <= max(_RESERVE_OF_FAILURES_SECONDS, self._interval):
                return
            if _digest(credential) in self._good:
                return
        raise RequestError(
            "From this address came too many tokens or codes that are not valid. Wait a minute.",
            code="too_many_failures",
            retryable=True,
        )

    def note_failure(self, address: str) -> None:
        """Count a try that failed."""
        with self._lock:
            now = self._monotonic()
            self._full_at[address] = max(self._full_at.get(address, now), now) + self._interval
            _keep_newest(self._full_at, address)

    def note_success(self, credential: str) -> None:
        """Remember what was good."""
        with self._lock:
            digest = _digest(credential)
            self._good[digest] = None
            _keep_newest(self._good, digest)


def _digest(credential: str) -> bytes:
    return hashlib.sha256(credential.encode(errors="replace")).digest()


def _keep_newest(known: OrderedDict[Any, Any], key: Any) -> None:
    known.move_to_end(key)
    if len(known) > _MOST_ADDRESSES:
        known.popitem(last=False)


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
