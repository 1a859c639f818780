"""Who works: worker processes, their machines and devices, and what each has in hand."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Query

from service.api.deps import ServicesDep, guarded
from service.api.objects import Page, WorkerObject, WorkerTask
from service.auth import Scope
from service.jobs.records import WorkerRecord

router = APIRouter(prefix="/v1/workers", tags=["workers"])


@router.get("", operation_id="workers.list", **guarded(Scope.JOBS_READ))
def list_workers(
    services: ServicesDep,
    within_seconds: Annotated[
        int, Query(ge=0, le=604_800, description="How long ago idle ones may have been seen.")
    ] = 3600,
) -> Page[WorkerObject]:
    """Workers that have a shard now or published one of late, of all replicas, by name."""
    since = services.clock() - timedelta(seconds=within_seconds)
    return Page(data=[_shown(worker) for worker in services.store.workers(since)])


def _shown(record: WorkerRecord) -> WorkerObject:
    task = None
    if record.job_id is not None:
        task = WorkerTask.model_validate(record, from_attributes=True)
    return WorkerObject(
        id=record.worker,
        node=record.worker.rpartition(":")[0] or record.worker,
        device=record.device,
        is_busy=task is not None,
        task=task,
        shards_done=record.shards_done,
        bytes_done=record.bytes_done,
        last_seen_at=record.last_seen_at,
    )
