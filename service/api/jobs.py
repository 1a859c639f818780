"""Jobs: submitting, listing and reading them."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Response
from pydantic import AwareDatetime, Field
from starlette.concurrency import run_in_threadpool

from merging.options import MergeOptions
from service.api.answers import job_answer, json_answer, page_answer
from service.api.deps import (
    JobId,
    PrincipalDep,
    Services,
    ServicesDep,
    TraceParent,
    guarded,
)
from service.api.filters import WORD, LabelQuery
from service.api.idempotency import IdempotencyKey, idempotency_request, mark_replayed, replays
from service.api.objects import JobCounts, JobDetail, JobObject, Page
from service.api.pagination import decode_cursor, encode_cursor
from service.api.schemas import IntegrationRequest, JobSubmission, Resubmission
from service.api.submission import submit
from service.auth import Scope
from service.jobs.records import JobCursor, JobFilter, JobRecord
from service.jobs.states import JobState
from service.problems import RequestError

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


class JobQuery(LabelQuery):
    """Filters of the list. What else comes is ``label.<name>=<value>``, any number of times."""

    limit: int = Field(default=20, ge=1, le=100)
    cursor: str | None = Field(default=None, description="Of the page before; keeps its filters.")
    state: list[JobState] = Field(default=[], max_length=len(JobState))
    q: str | None = Field(
        default=None,
        max_length=200,
        pattern=r"^[^\x00]*$",
        description="Words, each to be found in a job's id, method, addresses, labels or error.",
    )
    method: str | None = Field(default=None, pattern=WORD)
    initiator: str | None = Field(default=None, pattern=WORD)
    created_after: AwareDatetime | None = None

    def job_filter(self) -> JobFilter:
        """The filters as the store takes them."""
        return JobFilter(
            states=tuple(self.state),
            labels=self.labels,
            method=self.method,
            created_after=self.created_after,
            text=" ".join(self.q.split()) or None if self.q else None,
            initiator=self.initiator,
        )


@router.post(
    "",
    operation_id="jobs.create",
    status_code=201,
    response_model=JobDetail,
    responses=replays(JobDetail),
    **guarded(Scope.JOBS_WRITE),
)
async def create_job(
    body: JobSubmission,
    services: ServicesDep,
    principal: PrincipalDep,
    key: IdempotencyKey,
    traceparent: TraceParent,
) -> Response:
    """Submit a merge. Recipe, inputs and output are checked in full, from headers alone."""
    request = idempotency_request(key, principal, "/v1/jobs", body.model_dump(mode="json"))
    job, is_new = await submit(
        services, principal, body, idempotency=request, traceparent=traceparent
    )
    return _show_submitted(services, job, is_new=is_new)


@router.post(
    "/{job_id}/resubmit",
    operation_id="jobs.resubmit",
    status_code=201,
    response_model=JobDetail,
    responses=replays(JobDetail),
    **guarded(Scope.JOBS_WRITE),
)
async def resubmit_job(
    job_id: JobId,
    services: ServicesDep,
    principal: PrincipalDep,
    key: IdempotencyKey,
    traceparent: TraceParent,
    body: Resubmission | None = None,
) -> Response:
    """Submit a new job with the recipe, options, labels and metadata of this one."""
    body = body or Resubmission()
    path = f"/v1/jobs/{job_id}/resubmit"
    request = idempotency_request(key, principal, path, body.model_dump(mode="json"))
    old = await run_in_threadpool(services.store.get, job_id)
    submission = JobSubmission(
        recipe=old.recipe_source,
        output_uri=body.output_uri or old.output_uri,
        options=body.options or MergeOptions(**old.options),
        labels=old.labels,
        metadata=old.metadata,
        priority=old.priority,
        deadline_seconds=old.deadline_seconds,
        integrations=[
            IntegrationRequest(name=entry.name, options=entry.options) for entry in old.integrations
        ],
    )
    job, is_new = await submit(
        services,
        principal,
        submission,
        idempotency=request,
        resubmitted_from=job_id,
        traceparent=traceparent,
    )
    return _show_submitted(services, job, is_new=is_new)


def _show_submitted(services: Services, job: JobRecord, *, is_new: bool) -> Response:
    headers = {"Location": services.href(f"/v1/jobs/{job.id}")}
    response = job_answer(job, services.href, 201, headers)
    if not is_new:
        mark_replayed(response)
    return response


@router.get(
    "",
    operation_id="jobs.list",
    response_model=Page[JobObject],
    **guarded(Scope.JOBS_READ),
)
def list_jobs(query: Annotated[JobQuery, Query()], services: ServicesDep) -> Response:
    """Jobs, newest first. Follow ``next_url`` for more."""
    job_filter, cursor = query.job_filter(), None
    if query.cursor is not None:
        cursor, first_filter = decode_cursor(query.cursor, JobFilter)
        if job_filter not in (JobFilter(), first_filter):
            raise RequestError(
                "The cursor belongs to a list with other filters; leave the filters out.",
                code="bad_cursor",
            )
        job_filter = first_filter
    found = services.store.list_heads(job_filter, cursor=cursor, limit=query.limit + 1)
    page = found[: query.limit]
    data = services.shown_jobs.show(page)
    if len(found) <= query.limit:
        return page_answer(data)
    last = JobCursor(page[-1].created_at, page[-1].id)
    next_cursor = encode_cursor(last, job_filter)
    parameters = urlencode({"cursor": next_cursor, "limit": query.limit})
    next_url = services.href(f"/v1/jobs?{parameters}")
    headers = {"Link": f'<{next_url}>; rel="next"'}
    return page_answer(data, next_cursor=next_cursor, next_url=next_url, headers=headers)


@router.get(
    "/counts", operation_id="jobs.counts", response_model=JobCounts, **guarded(Scope.JOBS_READ)
)
def count_jobs(services: ServicesDep) -> Response:
    """Number of jobs in each state."""
    return json_answer({"object": "job_counts", "counts": services.store.counts()})


@router.get(
    "/{job_id}", operation_id="jobs.get", response_model=JobDetail, **guarded(Scope.JOBS_READ)
)
def read_job(job_id: JobId, services: ServicesDep) -> Response:
    """One job."""
    return job_answer(services.store.get(job_id), services.href)
