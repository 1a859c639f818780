"""Submitting a job: check it in full, then queue it once."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool

from merging.plan.plan import Plan
from service.api.deps import Services
from service.api.planning import plan_merge
from service.api.schemas import JobSubmission
from service.auth import Principal
from service.jobs.records import IdempotencyRequest, JobRecord, NewJob


async def submit(
    services: Services,
    principal: Principal,
    body: JobSubmission,
    *,
    idempotency: IdempotencyRequest | None,
    resubmitted_from: str | None = None,
) -> tuple[JobRecord, bool]:
    """Queue a merge, or give the first job of the idempotency key.

    The plan that is made here shows that the merge can work, and is then dropped: the runner plans
    anew, and it is that plan which pins the versions of the inputs. A key that was used before is
    looked up first, since what its job has done meanwhile (filled the output) is no fault.

    Returns:
        The job, and whether this call made it.
    """
    if idempotency is not None:
        first = await run_in_threadpool(services.store.find_submitted, idempotency)
        if first is not None:
            return first, False
    plan = await plan_merge(services, body)
    job = _new_job(body, plan, principal, resubmitted_from)
    record, is_new = await run_in_threadpool(services.store.submit, job, idempotency=idempotency)
    if is_new:
        services.metrics.jobs_submitted.labels(plan.method).inc()
    return record, is_new


def _new_job(
    body: JobSubmission, plan: Plan, principal: Principal, resubmitted_from: str | None
) -> NewJob:
    inputs: list[dict[str, Any]] = msgspec.to_builtins(plan.inputs)
    return NewJob(
        type=body.type,
        recipe_source=body.recipe,
        recipe=plan.recipe,
        recipe_digest=plan.recipe_digest,
        method=plan.method,
        output_uri=plan.output_uri,
        options=body.options.model_dump(mode="json"),
        inputs=tuple(inputs),
        warnings=plan.warnings,
        labels=body.labels,
        metadata=body.metadata,
        priority=body.priority,
        deadline_seconds=body.deadline_seconds,
        initiator=principal.token_id,
        resubmitted_from=resubmitted_from,
    )
