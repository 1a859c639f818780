"""What comes of a job: its shards, its result, its report."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from service.api.answers import page_answer
from service.api.deps import JobId, ServicesDep, guarded
from service.api.objects import JobResult, Page, ShardObject
from service.api.views import shard_object
from service.auth import Scope
from service.jobs.states import JobState
from service.problems import RequestError

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

_POLL_AGAIN_SECONDS = 5


@router.get(
    "/{job_id}/shards",
    operation_id="jobs.shards",
    response_model=Page[ShardObject],
    **guarded(Scope.JOBS_READ),
)
def list_shards(job_id: JobId, services: ServicesDep) -> Response:
    """The output files of a job in order, with progress and receipts; empty before planning."""
    found = services.store.shards(job_id)
    if not found:
        services.store.get(job_id)
    return page_answer([shard_object(shard) for shard in found])


@router.get(
    "/{job_id}/result",
    operation_id="jobs.result",
    responses={202: {"description": "Not finished yet", "model": JobResult}},
    **guarded(Scope.JOBS_READ),
)
def read_result(job_id: JobId, services: ServicesDep, response: Response) -> JobResult:
    """For clients that look at status codes: 200 done, 202 not yet, 409 failed or cancelled."""
    job = services.store.get(job_id)
    if job.state == JobState.FAILED:
        reason = (job.error or {}).get("detail", "no reason was recorded")
        raise RequestError(f"Job {job_id} failed: {reason}", code="job_failed")
    if job.state == JobState.CANCELLED:
        raise RequestError(f"Job {job_id} was cancelled.", code="job_cancelled")
    if not job.is_terminal:
        response.status_code = 202
        response.headers["Retry-After"] = str(_POLL_AGAIN_SECONDS)
    return JobResult(job_id=job.id, state=job.state, output=job.output)


@router.get(
    "/{job_id}/report",
    operation_id="jobs.report",
    response_model=dict[str, Any],
    **guarded(Scope.JOBS_READ),
)
def read_report(job_id: JobId, services: ServicesDep) -> JSONResponse:
    """The merge report: inputs with version pins, digests, figures per tensor, output files.

    As it was when the job succeeded, whatever became of the output since.
    """
    job = services.store.get(job_id)
    report = services.store.load_report(job_id)
    if report is None:
        raise RequestError(
            f"Job {job_id} is {job.state}; a job has a report once it has succeeded.",
            code="not_found",
        )
    return JSONResponse(report)
