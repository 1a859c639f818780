"""One try at delivering a message to a webhook endpoint, and what follows from its outcome."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import httpcore

from merging.errors import MergeError
from service.jobs.outbox import Announcement, AttemptOutcome, DeliveryRecord, DeliveryState
from service.webhooks.address_guard import AddressGuard, GuardedBackend, Resolve

LIMIT_SECONDS = 15.0
"""For a whole try: resolving, connecting, sending, and the beginning of the reply."""

RETRY_SECONDS = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Waits after the first try, the second …: ten tries in some three days and a half."""

_JITTER = 0.1
"""Waits are longer by up to this part, so that what failed together does not return together."""

_KEPT_BYTES = 1024
_LONGEST_WAIT = timedelta(hours=24)
_PAUSE = timedelta(seconds=60)
_SLOW_DOWN = frozenset(
    {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT}
)


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of a request.

    Attributes:
        status: Of the reply; None if there was none.
        body: Its beginning, as text.
        error: Why there was no reply.
        retry_after: What the receiver asked for.
    """

    status: int | None = None
    body: str | None = None
    error: str | None = None
    retry_after: str | None = None

    @property
    def is_success(self) -> bool:
        """Only these are; redirects are not followed."""
        return self.status is not None and HTTPStatus(200) <= self.status < 300


class Caller:
    """Makes the requests. No cookies, proxies, redirects or connections are shared between them.

    Args:
        guard: Which addresses may be called.
        tls: For tests; by default the system's authorities are trusted.
        resolve: For tests.
    """

    def __init__(
        self,
        guard: AddressGuard,
        *,
        tls: ssl.SSLContext | None = None,
        resolve: Resolve | None = None,
    ) -> None:
        self._guard = guard
        self._tls = tls or ssl.create_default_context()
        self._resolve = resolve

    async def post(
        self,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        limit_seconds: float = LIMIT_SECONDS,
    ) -> Reply:
        """Send a message. Whatever goes wrong is told in the reply."""
        try:
            self._guard.check_url(url)
            async with asyncio.timeout(limit_seconds):
                return await self._post(url, headers, body)
        except TimeoutError:
            return Reply(error=f"No answer within {limit_seconds:g} seconds.")
        except MergeError as error:
            return Reply(error=error.detail)
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
            return Reply(error=f"The connection failed: {str(error) or type(error).__name__}.")

    async def _post(self, url: str, headers: Mapping[str, str], body: bytes) -> Reply:
        parts = urlsplit(url)
        target = httpcore.URL(
            scheme=parts.scheme,
            host=parts.hostname or "",
            port=parts.port,
            target=(parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
        )
        backend = GuardedBackend(
            self._guard, is_secure=parts.scheme == "https", resolve=self._resolve
        )
        all_headers = {"host": parts.netloc, "content-length": str(len(body)), **headers}
        async with (
            httpcore.AsyncConnectionPool(
                ssl_context=self._tls, network_backend=backend, max_connections=1
            ) as pool,
            pool.stream("POST", target, headers=list(all_headers.items()), content=body) as reply,
        ):
            found = {name.lower(): value for name, value in reply.headers}
            return Reply(
                status=reply.status,
                body=await _beginning(reply),
                retry_after=found.get(b"retry-after", b"").decode("latin-1") or None,
            )


async def _beginning(reply: httpcore.Response) -> str:
    """The first kilobyte; the rest stays unread. As text that any database takes."""
    data = b""
    async for part in reply.aiter_stream():
        data += part
        if len(data) >= _KEPT_BYTES:
            break
    return data[:_KEPT_BYTES].decode(errors="replace").replace("\x00", "�")


def judge(reply: Reply, delivery: DeliveryRecord, now: datetime) -> AttemptOutcome:
    """What follows from the reply to a try. A test is tried once."""
    facts: dict[str, Any] = {"response_status": reply.status, "response_body": reply.body}
    if reply.is_success:
        return AttemptOutcome(state=DeliveryState.DELIVERED, **facts)
    error = reply.error or _describe(reply.status)
    if reply.status == HTTPStatus.GONE:
        flag = "The receiver said that it is gone (410): the endpoint was disabled."
        return AttemptOutcome(
            state=DeliveryState.FAILED, error=error, flag=flag, disable=True, **facts
        )
    asked = parse_retry_after(reply.retry_after, now)
    pause = (asked or _PAUSE) if reply.status in _SLOW_DOWN else asked
    is_test = delivery.type == Announcement.ENDPOINT_TEST
    wait = None if is_test else retry_wait(delivery.attempts)
    if wait is None:
        flag = f"Given up on {delivery.id} after {delivery.attempts} tries. The last: {error}"
        return AttemptOutcome(
            state=DeliveryState.FAILED,
            error=error,
            flag=None if is_test else flag,
            pause_for=pause,
            **facts,
        )
    return AttemptOutcome(
        state=DeliveryState.PENDING,
        retry_in=max(wait, pause or wait),
        error=error,
        pause_for=pause,
        **facts,
    )


def retry_wait(attempts: int) -> timedelta | None:
    """How long to wait after the failure of the try with this number; None: give up."""
    if attempts > len(RETRY_SECONDS):
        return None
    seconds = RETRY_SECONDS[attempts - 1]
    return timedelta(seconds=seconds * (1 + random.uniform(0, _JITTER)))  # noqa: S311 - no secret


def parse_retry_after(text: str | None, now: datetime) -> timedelta | None:
    """A ``Retry-After`` header: seconds or a date; at most a day, None if it is neither."""
    if text is None:
        return None
    if text.strip().isascii() and text.strip().isdigit():
        return min(timedelta(seconds=int(text.strip()[:9])), _LONGEST_WAIT)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    date = date.replace(tzinfo=UTC) if date.tzinfo is None else date
    return min(max(date - now, timedelta(0)), _LONGEST_WAIT)


def _describe(status: int | None) -> str:
    if status is not None and 300 <= status < 400:
        return f"The receiver answered {status}; redirects are not followed."
    return f"The receiver answered {status}."
