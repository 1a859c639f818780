"""A job's log as text: whole, in part, or as it grows."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import PlainTextResponse
from starlette.concurrency import run_in_threadpool

from service.api.deps import JobId, PrincipalDep, Services, ServicesDep, guarded
from service.api.errors import request_facts
from service.api.following import follow_events
from service.api.streams import TextStream
from service.auth import Scope
from service.job_log import log_text
from service.jobs.errors import StoreUnavailableError
from service.problems import problem, problem_response

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_PAGE = 1000


@router.get(
    "/{job_id}/logs",
    operation_id="jobs.logs",
    response_class=PlainTextResponse,
    responses={206: {"content": {"text/plain": {}}, "description": "The part that was asked for"}},
    **guarded(Scope.JOBS_READ),
)
async def read_log(
    job_id: JobId,
    request: Request,
    services: ServicesDep,
    principal: PrincipalDep,
    *,
    follow: Annotated[bool, Query(description="Stay until the job has ended.")] = False,
    part: Annotated[
        str | None, Header(alias="Range", description="As in bytes=100- or bytes=-100.")
    ] = None,
) -> Response:
    """What happened, as lines for people. It only grows; ``Range`` gives what came since."""
    await run_in_threadpool(services.store.get, job_id)
    if follow:
        return TextStream(_grow(services, job_id), slot=services.streams.hold(principal.token_id))
    log = await run_in_threadpool(_whole, services, job_id)
    wanted = _RANGE.fullmatch(part or "")
    if wanted is None or wanted.group() == "bytes=-":
        return PlainTextResponse(log, headers={"Accept-Ranges": "bytes"})
    first, last = _bounds(wanted.group(1), wanted.group(2), len(log))
    if first > last:
        detail = f"The log of job {job_id} has {len(log)} bytes so far."
        body = problem("range_not_satisfiable", detail, **request_facts(request))
        return problem_response(body, {"Content-Range": f"bytes */{len(log)}"})
    headers = {"Content-Range": f"bytes {first}-{last}/{len(log)}"}
    return PlainTextResponse(log[first : last + 1], 206, headers)


def _whole(services: Services, job_id: str) -> bytes:
    parts, position = [], 0
    while page := services.store.events(job_id, after=position, limit=_PAGE):
        parts += [log_text(event) for event in page]
        position = page[-1].seq
    return "".join(parts).encode()


def _bounds(start: str, end: str, size: int) -> tuple[int, int]:
    """First and last byte of a range; the first comes after the last if there are none."""
    if not start:
        return max(size - int(end), 0), size - 1
    return int(start), min(int(end or size), size - 1)


async def _grow(services: Services, job_id: str) -> AsyncIterator[bytes]:
    async with aclosing(follow_events(services, job_id, 0)) as pages:
        with suppress(StoreUnavailableError):  # too late for a problem: the text ends here
            async for page in pages:
                for event in page:
                    yield log_text(event.record).encode()
