"""A job's events: live as server-sent events, or as pages of JSON."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from service.api.answers import page_answer
from service.api.deps import JobId, PrincipalDep, Services, ServicesDep, guarded
from service.api.following import follow_events
from service.api.objects import EventObject, Page
from service.api.streams import EventStream, Position, retry_message
from service.auth import Scope
from service.jobs.errors import StoreUnavailableError
from service.problems import RequestError

router = APIRouter(prefix="/v1/jobs", tags=["events"])

PAGE_EVENTS = 100
"""Of a page of JSON, unless asked for otherwise."""


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
    position: Position,
    limit: Annotated[int, Query(ge=1, le=1000, description="Of a page of JSON.")] = PAGE_EVENTS,
) -> Response:
    """Events of a job in order: a stream with ``Accept: text/event-stream``, else a page.

    The stream ends after ``job.finished``. Whoever resumes there gets 204.
    """
    if "text/event-stream" not in request.headers.get("accept", ""):
        return await run_in_threadpool(events_page, services, job_id, position or 0, limit)
    last, is_terminal = await run_in_threadpool(_checked_end, services, job_id, position or 0)
    if is_terminal and position == last:
        return Response(status_code=204)
    return EventStream(
        _stream(services, job_id, position or 0),
        slot=services.streams.hold(principal.token_id),
    )


def _checked_end(services: Services, job_id: str, position: int) -> tuple[int, bool]:
    """The job's last event and whether it is terminal, if there are events up to the position."""
    last, is_terminal = services.store.last_event(job_id)
    if position > last:
        raise RequestError(f"Job {job_id} has had {last} events; resume at one of them.")
    return last, is_terminal


def events_page(
    services: Services, job_id: str, after: int = 0, limit: int = PAGE_EVENTS
) -> Response:
    """Events of a job after one of them, as JSON."""
    found = services.store.events(job_id, after=after, limit=limit + 1)
    if not found:
        _checked_end(services, job_id, after)
    data = found[:limit]
    if len(found) <= limit:
        return page_answer(data)
    last = str(data[-1].seq)
    parameters = urlencode({"after": last, "limit": limit})
    next_url = services.href(f"/v1/jobs/{job_id}/events?{parameters}")
    return page_answer(data, next_cursor=last, next_url=next_url)


async def _stream(services: Services, job_id: str, after: int) -> AsyncGenerator[bytes]:
    yield retry_message()
    try:
        async with aclosing(follow_events(services, job_id, after)) as pages:
            async for page in pages:  # an empty one: say so, that proxies keep the connection
                yield b"".join(event.sse for event in page) or format_sse_event(
                    comment="still here"
                )
    except StoreUnavailableError:  # too late for a problem; the client resumes
        yield format_sse_event(comment="the job store does not answer")
