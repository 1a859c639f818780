"""Answers that last: each takes one of the token's slots for as long as it is being sent."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from fastapi.sse import EventSourceResponse
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send


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
    """Server-sent events."""


class TextStream(_Held, StreamingResponse):
    """Text that grows."""

    media_type = "text/plain"
