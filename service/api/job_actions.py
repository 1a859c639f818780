"""Changing jobs: cancel, retry, labels and priority, forgetting."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Response

from service.api.answers import job_answer
from service.api.deps import JobId, PrincipalDep, ServicesDep, guarded
from service.api.objects import JobDetail
from service.api.outputs import delete_output
from service.api.schemas import CancelRequest, JobPatch
from service.api.submission import refuse_overload
from service.auth import Scope
from service.jobs.errors import RevisionMismatchError
from service.jobs.states import JobState

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

_ETAG = re.compile(r'"(\d{1,18})"')

IfMatch = Annotated[str | None, Header(description="ETag of the job as it was read.")]


@router.post(
    "/{job_id}/cancel",
    operation_id="jobs.cancel",
    status_code=202,
    response_model=JobDetail,
    responses={200: {"description": "It was asked for already", "model": JobDetail}},
    **guarded(Scope.JOBS_WRITE),
)
def cancel_job(job_id: JobId, services: ServicesDep, body: CancelRequest | None = None) -> Response:
    """Stop a job. ``orderly`` lets workers tidy up, ``now`` ends their processes."""
    before = services.store.get(job_id)
    job = services.store.request_cancel(job_id, (body or CancelRequest()).mode)
    if before.state == JobState.QUEUED and job.state == JobState.CANCELLED:  # no runner counts it
        services.metrics.jobs_finished.labels(job.method, job.state.value).inc()
    is_repeat = job.cancel_requested == before.cancel_requested
    return job_answer(job, services.href, 200 if is_repeat else 202)


@router.post(
    "/{job_id}/retry",
    operation_id="jobs.retry",
    status_code=202,
    response_model=JobDetail,
    **guarded(Scope.JOBS_WRITE),
)
def retry_job(job_id: JobId, services: ServicesDep, principal: PrincipalDep) -> Response:
    """Queue a failed job again as its next attempt; finished shards are reused."""
    refuse_overload(services, principal)
    return job_answer(services.store.retry(job_id), services.href, 202)


@router.patch(
    "/{job_id}", operation_id="jobs.update", response_model=JobDetail, **guarded(Scope.JOBS_WRITE)
)
def update_job(
    job_id: JobId,
    body: JobPatch,
    services: ServicesDep,
    if_match: IfMatch = None,
) -> Response:
    """Replace the labels, or change the priority of a queued job."""
    job = services.store.patch(
        job_id,
        labels=body.labels,
        priority=body.priority,
        if_revision=_revision(if_match),
    )
    return job_answer(job, services.href)


@router.delete(
    "/{job_id}", operation_id="jobs.delete", status_code=204, **guarded(Scope.JOBS_WRITE)
)
def delete_job(
    job_id: JobId,
    services: ServicesDep,
    principal: PrincipalDep,
    output: Annotated[
        Literal["keep", "delete"],
        Query(description="Whether the merged checkpoint goes too: needs ``output:delete``."),
    ] = "keep",
) -> None:
    """Forget a job that has ended. Its output stays where it is, unless it is to go too.

    Of the output only what this job published is removed, and nothing (409) if another job needs
    it or it is not what the job published any more.
    """
    if output == "delete":
        principal.require(Scope.OUTPUT_DELETE)
        delete_output(services, job_id)
    services.store.delete(job_id)


def _revision(if_match: str | None) -> int | None:
    if if_match is None or if_match.strip() == "*":
        return None
    match = _ETAG.fullmatch(if_match.strip())
    if match is None:
        raise RevisionMismatchError("If-Match is not an ETag that this service gave.")
    return int(match.group(1))
