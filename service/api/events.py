"""A job's events: live as server-sent events, or as pages of JSON."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from service.api.deps import JobId, PrincipalDep, Services, ServicesDep, guarded
from service.api.following import follow_events
from service.api.objects import EventObject, Page
from service.api.streams import EventStream, Position, retry_message
from service.api.views import event_object
from service.auth import Scope
from service.jobs.errors import StoreUnavailableError
from service.problems import RequestError

router = APIRouter(prefix="/v1/jobs", tags=["events"])


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
    yield retry_message()
    try:
        async with aclosing(follow_events(services, job_id, after)) as pages:
            async for page in pages:  # an empty one: say so, that proxies keep the connection
                yield b"".join(event.sse for event in page) or format_sse_event(
                    comment="still here"
                )
    except StoreUnavailableError:  # too late for a problem; the client resumes
        yield format_sse_event(comment="the job store does not answer")
