"""Answers that last: each takes one of the token's slots for as long as it is being sent."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, aclosing
from time import monotonic
from typing import Annotated, Any

from fastapi import Depends, Header, Query
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from service.problems import RequestError

_RETRY_MILLISECONDS = (1500, 2500)
"""Clients reconnect after a time between these, so that a restart does not meet all at once."""

_RETRY_AT_ONCE_MILLISECONDS = 100

LONGEST_SECONDS = 900.0
"""After this a stream ends, and whoever follows it shows who he is anew."""


async def _position(
    last_event_id: Annotated[
        str | None, Header(description="Id of the last event seen; resumes a stream.")
    ] = None,
    after: Annotated[
        int | None, Query(ge=0, description="The same, for clients that cannot set headers.")
    ] = None,
) -> int | None:
    """Read as text: a browser repeats whatever id it saw, and must get a problem it can show."""
    if not last_event_id:
        return after
    if not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 16):
        raise RequestError("Last-Event-ID is the number of an event.")
    return int(last_event_id)


Position = Annotated[int | None, Depends(_position)]
"""Where a stream or a page of events begins."""


def retry_message(position: int | None = None) -> bytes:
    """The beginning of a stream: when to come back, and where it stands."""
    retry = random.randint(*_RETRY_MILLISECONDS)  # noqa: S311 - spreads load, protects nothing
    return format_sse_event(retry=retry, id=None if position is None else str(position))


class _Held(Response):
    """Takes the slot before anything is sent: without one the answer can still be a problem."""

    def __init__(self, content: Any, *, slot: AbstractContextManager[None], **options: Any) -> None:
        super().__init__(content, **options)
        self._slot = slot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with self._slot:
            await super().__call__(scope, receive, send)


class EventStream(_Held, EventSourceResponse):
    """Server-sent events, for a quarter of an hour at most: then the client comes back at once.

    So a stream outlives neither its token nor its session by more than that.
    """

    def __init__(
        self, content: AsyncGenerator[bytes], *, slot: AbstractContextManager[None]
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_for_a_while(content), slot=slot, headers=headers)


async def _for_a_while(content: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    ends_at = monotonic() + LONGEST_SECONDS
    async with aclosing(content):
        async for piece in content:  # something comes at least every 15 s
            yield piece
            if monotonic() >= ends_at:
                yield format_sse_event(retry=_RETRY_AT_ONCE_MILLISECONDS)
                return


class TextStream(_Held, StreamingResponse):
    """Text that grows."""

    media_type = "text/plain"
