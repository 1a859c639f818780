"""What a merge would do."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response
from starlette.concurrency import run_in_threadpool

from merging.plan.plan import Plan
from merging.plan.summary import plan_summary
from service.api.deps import PrincipalDep, Services, ServicesDep, guarded
from service.api.idempotency import (
    IdempotencyKey,
    idempotency_request,
    mark_replayed,
    replays,
)
from service.api.objects import PlanObject
from service.api.planning import plan_merge
from service.api.schemas import PlanRequest, is_plan_id
from service.auth import Scope
from service.jobs.errors import RepeatedRequestError
from service.jobs.records import IdempotencyRequest, NewPlan, PlanRecord
from service.problems import RequestError

router = APIRouter(prefix="/v1/plans", tags=["plans"])


@router.post(
    "",
    operation_id="plans.create",
    status_code=201,
    responses=replays(PlanObject),
    **guarded(Scope.JOBS_WRITE),
)
async def create_plan(
    body: PlanRequest,
    services: ServicesDep,
    principal: PrincipalDep,
    key: IdempotencyKey,
    response: Response,
) -> PlanObject:
    """Plan a merge without running it: shards, bytes, flops, memory, time.

    Nothing is written to storage. A job may name the plan for a day, to run exactly that.
    ``estimate`` is null until workers have done a shard and so told how fast they are.
    """
    request = idempotency_request(key, principal, "/v1/plans", body.model_dump(mode="json"))
    try:
        if request is not None:  # before any work: what was planned may be gone by now
            first = await run_in_threadpool(services.store.find_created, request)
            if first is not None:
                raise RepeatedRequestError(first)
        body, plan = await plan_merge(services, body)
        kept = await run_in_threadpool(_keep, services, body, plan, request)
    except RepeatedRequestError as repeated:
        kept = await run_in_threadpool(services.store.find_plan, repeated.object_id)
        mark_replayed(response)
    response.headers["Location"] = services.href(f"/v1/plans/{kept.id}")
    return _plan_object(services, kept)


@router.get("/{plan_id}", operation_id="plans.get", **guarded(Scope.JOBS_READ))
def read_plan(
    plan_id: Annotated[str, Path(description="Id of a plan.")], services: ServicesDep
) -> PlanObject:
    """A plan that was made within the last day."""
    if not is_plan_id(plan_id):
        raise RequestError(f"There is no plan {plan_id[:100]}.", code="not_found")
    return _plan_object(services, services.store.find_plan(plan_id))


def _keep(
    services: Services, body: PlanRequest, plan: Plan, request: IdempotencyRequest | None
) -> PlanRecord:
    return services.store.keep_plan(
        NewPlan(
            recipe_source=body.recipe,
            options=body.options.model_dump(mode="json"),
            summary=plan_summary(plan, services.forecast.estimate(plan)),
        ),
        idempotency=request,
    )


def _plan_object(services: Services, plan: PlanRecord) -> PlanObject:
    members = {
        **plan.summary,
        "object": "plan",
        "id": plan.id,
        "created_at": plan.created_at,
        "expires_at": plan.expires_at,
        "url": services.href(f"/plans/{plan.id}"),
    }
    return PlanObject.model_validate(members)
