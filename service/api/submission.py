"""Submitting a job: check it in full, then queue it once."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool

from merging.errors import Fault
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.summary import plan_methods
from service.api.deps import Services
from service.api.planning import plan_merge
from service.api.schemas import JobSubmission, PlanRequest
from service.auth import Principal
from service.integrations.catalogue import check_integrations
from service.jobs.errors import NotFoundError
from service.jobs.records import IdempotencyRequest, JobIntegration, JobRecord, NewJob, PlanRecord
from service.pinned import check_pinned
from service.problems import RequestError


async def submit(
    services: Services,
    principal: Principal,
    body: JobSubmission,
    *,
    idempotency: IdempotencyRequest | None,
    resubmitted_from: str | None = None,
    traceparent: str | None = None,
) -> tuple[JobRecord, bool]:
    """Queue a merge, or give the first job of the idempotency key.

    The plan that is made here shows that the merge can work, and is then dropped: the runner plans
    anew, and it is that plan which pins the versions of the inputs. If the request names a stored
    plan, both must come out as that one. A key that was used before is looked up first, since what
    its job has done meanwhile (filled the output) is no fault.

    Returns:
        The job, and whether this call made it.
    """
    if idempotency is not None:
        first = await run_in_threadpool(services.store.find_submitted, idempotency)
        if first is not None:
            return first, False
    integrations = _integrations(services, body)
    await run_in_threadpool(refuse_overload, services, principal)
    stored = await _stored_plan(services, body)
    request = _plan_request(body, stored)
    request, plan = await plan_merge(services, request, is_stored=stored is not None)
    if stored is not None:
        check_pinned(plan, stored.summary["plan_digest"], stored.summary["inputs"])
    job = _new_job(body, request, plan, principal, resubmitted_from, integrations)
    job = msgspec.structs.replace(job, traceparent=traceparent)
    record, is_new = await run_in_threadpool(services.store.submit, job, idempotency=idempotency)
    if is_new:
        services.metrics.jobs_submitted.labels(plan.method).inc()
    return record, is_new


def refuse_overload(services: Services, principal: Principal) -> None:
    """Raise ``queue_full`` or ``quota_exceeded`` if there is enough to do already.

    Requests at the same moment do not see each other: a limit may be passed by a few.
    """
    settings = services.settings
    backlog = services.store.backlog(principal.token_id)
    if backlog.queued >= settings.max_queued_jobs:
        raise RequestError(
            f"{backlog.queued} jobs wait already. Submit again when some have been done.",
            code="queue_full",
            retryable=True,
        )
    quota = settings.max_unfinished_jobs_per_token
    if quota is not None and backlog.unfinished >= quota:
        raise RequestError(
            f"This token has {backlog.unfinished} unfinished jobs, and may have {quota}. Wait for"
            " some to end, or cancel them.",
            code="quota_exceeded",
            retryable=True,
        )


async def _stored_plan(services: Services, body: JobSubmission) -> PlanRecord | None:
    if body.plan_id is None:
        return None
    both = {"recipe", "output_uri", "options"} & body.model_fields_set
    if both:
        raise _refusal(*(f"/{name}" for name in sorted(both)), detail="The plan has its own.")
    try:
        return await run_in_threadpool(services.store.find_plan, body.plan_id)
    except NotFoundError as error:
        raise RequestError(f"{error.detail} Make a new plan.", code="plan_outdated") from None


def _plan_request(body: JobSubmission, stored: PlanRecord | None) -> PlanRequest:
    if stored is not None:
        return PlanRequest(
            recipe=stored.recipe_source,
            output_uri=stored.summary["output_uri"],
            options=MergeOptions.model_validate(stored.options),
        )
    if body.recipe is None or body.output_uri is None:
        missing = [f"/{name}" for name in ("recipe", "output_uri") if getattr(body, name) is None]
        raise _refusal(*missing, detail="Needed, unless 'plan_id' names a stored plan.")
    return PlanRequest(recipe=body.recipe, output_uri=body.output_uri, options=body.options)


def _refusal(*pointers: str, detail: str) -> RequestError:
    return RequestError(
        f"{', '.join(pointer[1:] for pointer in pointers)}: {detail}",
        code="invalid_request",
        faults=[Fault(pointer, "invalid_request", detail) for pointer in pointers],
    )


def _integrations(services: Services, body: JobSubmission) -> tuple[JobIntegration, ...]:
    if body.integrations is None:
        asked = [JobIntegration(name) for name in services.settings.integrations]
    else:
        asked = [JobIntegration(entry.name, entry.options) for entry in body.integrations]
    return check_integrations(asked, services.integrations)


def _new_job(
    body: JobSubmission,
    request: PlanRequest,
    plan: Plan,
    principal: Principal,
    resubmitted_from: str | None,
    integrations: tuple[JobIntegration, ...],
) -> NewJob:
    inputs: list[dict[str, Any]] = msgspec.to_builtins(plan.inputs)
    return NewJob(
        type=body.type,
        recipe_source=request.recipe,
        recipe=plan.recipe,
        recipe_digest=plan.recipe_digest,
        method=plan.method,
        methods=plan_methods(plan),
        output_uri=plan.output_uri,
        options=request.options.model_dump(mode="json"),
        inputs=tuple(inputs),
        warnings=plan.warnings,
        labels=body.labels,
        metadata=body.metadata,
        priority=body.priority,
        deadline_seconds=body.deadline_seconds,
        initiator=principal.token_id,
        resubmitted_from=resubmitted_from,
        plan_id=body.plan_id,
        pinned_plan_digest=plan.digest if body.plan_id else None,
        integrations=integrations,
    )
