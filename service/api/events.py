"""A job's events: live as server-sent events, or as pages of JSON."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from service.api.deps import JobId, PrincipalDep, Services, ServicesDep, guarded
from service.api.following import follow_events
from service.api.objects import EventObject, Page
from service.api.streams import EventStream
from service.api.views import event_object
from service.auth import Scope
from service.jobs.errors import StoreUnavailableError
from service.problems import RequestError

router = APIRouter(prefix="/v1/jobs", tags=["events"])

_RETRY_MILLISECONDS = (1500, 2500)
"""Clients reconnect after a time between these, so that a restart does not meet all at once."""

_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def _position(
    last_event_id: Annotated[
        str | None, Header(description="Number of the last event seen; resumes a stream.")
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


@router.get(
    "/{job_id}/events",
    operation_id="jobs.events",
    response_model=Page[EventObject],
    responses={
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        204: {"description": "The stream has been seen to its end; do not come back"},
    },
    **guarded(Scope.JOBS_READ),
)
async def list_events(
    job_id: JobId,
    request: Request,
    services: ServicesDep,
    principal: PrincipalDep,
    position: Annotated[int | None, Depends(_position)],
    limit: Annotated[int, Query(ge=1, le=1000, description="Of a page of JSON.")] = 100,
) -> Response | Page[EventObject]:
    """Events of a job in order: a stream with ``Accept: text/event-stream``, else a page.

    The stream ends after ``job.finished``. Whoever resumes there gets 204.
    """
    job = await run_in_threadpool(services.store.get, job_id)
    if position is not None and position > job.event_seq:
        raise RequestError(f"Job {job_id} has had {job.event_seq} events; resume at one of them.")
    if "text/event-stream" not in request.headers.get("accept", ""):
        return await _page(services, job_id, position or 0, limit)
    if job.is_terminal and position == job.event_seq:
        return Response(status_code=204)
    return EventStream(
        _stream(services, job_id, position or 0),
        slot=services.streams.hold(principal.token_id),
        headers=_STREAM_HEADERS,
    )


async def _page(services: Services, job_id: str, after: int, limit: int) -> Page[EventObject]:
    found = await run_in_threadpool(services.store.events, job_id, after=after, limit=limit + 1)
    data = [event_object(event) for event in found[:limit]]
    if len(found) <= limit:
        return Page(data=data)
    last = str(data[-1].seq)
    parameters = urlencode({"after": last, "limit": limit})
    next_url = services.href(f"/v1/jobs/{job_id}/events?{parameters}")
    return Page(data=data, next_cursor=last, next_url=next_url)


async def _stream(services: Services, job_id: str, after: int) -> AsyncIterator[bytes]:
    retry = random.randint(*_RETRY_MILLISECONDS)  # noqa: S311 - spreads load, protects nothing
    yield format_sse_event(retry=retry)
    try:
        async with aclosing(follow_events(services, job_id, after)) as pages:
            async for page in pages:  # an empty one: say so, that proxies keep the connection
                yield b"".join(event.sse for event in page) or format_sse_event(
                    comment="still here"
                )
    except StoreUnavailableError:  # too late for a problem; the client resumes
        yield format_sse_event(comment="the job store does not answer")
