"""What a merge would do."""

from __future__ import annotations

import anyio.to_thread
from fastapi import APIRouter

from merging.plan.summary import plan_summary
from service.api.deps import ServicesDep, guarded
from service.api.objects import PlanObject
from service.api.planning import plan_merge
from service.api.schemas import PlanRequest
from service.auth import Scope

router = APIRouter(prefix="/v1/plans", tags=["plans"])


@router.post("", operation_id="plans.create", **guarded(Scope.JOBS_WRITE))
async def create_plan(body: PlanRequest, services: ServicesDep) -> PlanObject:
    """Plan a merge without running it: shards, bytes, flops, memory, time. Nothing is written.

    ``estimate`` is null until workers have done a shard and so told how fast they are.
    """
    plan = await plan_merge(services, body)
    estimate = await anyio.to_thread.run_sync(services.forecast.estimate, plan)
    members = {
        **plan_summary(plan, estimate),
        "object": "plan",
        "created_at": services.clock(),
    }
    return PlanObject.model_validate(members)
