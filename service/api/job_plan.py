"""The plan that a job runs, down to its tensors."""

from __future__ import annotations

from fastapi import APIRouter

from merging.plan.plan import Plan
from merging.plan.summary import plan_summary
from service.api.deps import JobId, ServicesDep, guarded
from service.api.objects import JobPlan, PlannedTensor
from service.auth import Scope
from service.problems import RequestError

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.get("/{job_id}/plan", operation_id="jobs.plan", **guarded(Scope.JOBS_READ))
def read_plan(job_id: JobId, services: ServicesDep) -> JobPlan:
    """What the job does: the figures of ``POST /v1/plans``, and every tensor in file order.

    A tensor that is made by way of intermediate files is listed for each of them too.
    Tensors go through the stages in that order, so the counts of ``job.progress`` say which of
    them are fetched, solved and written.
    """
    job = services.store.get(job_id)
    plan = services.store.load_plan(job_id)
    if plan is None:
        raise RequestError(
            f"Job {job_id} is {job.state}; a job has a plan once its inputs' headers are read.",
            code="not_found",
        )
    summary = plan_summary(plan, services.forecast.estimate(plan))
    members = {**summary, "object": "job_plan", "created_at": job.created_at, "job_id": job_id}
    return JobPlan.model_validate({**members, "layout": _layout(plan)})


def _layout(plan: Plan) -> list[PlannedTensor]:
    """Work for tensors of the output; what is combined of several is for none of them."""
    names = {problem.tensor_name for shard in plan.outputs for problem in shard.problems}
    return [
        PlannedTensor(
            name=problem.tensor_name,
            shard=shard.index,
            kind=shard.kind,
            role=problem.role,
            layer=problem.layer,
            shape=problem.shape,
            dtype=problem.dtype,
            method=plan.settings[problem.setting].method,
            bytes_read=problem.bytes_read,
            flops=problem.flops,
        )
        for shard in plan.shards
        for problem in shard.problems
        if problem.tensor_name in names
    ]
