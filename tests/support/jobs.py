"""Jobs and plans without checkpoints, for tests of the job store and the runner."""

from __future__ import annotations

import itertools
from typing import Any

from merging.plan.outputs import Input, Totals
from merging.plan.plan import (
    PLAN_FORMAT,
    Plan,
    Problem,
    Setting,
    Shard,
    Source,
    SourceFile,
)
from merging.receipts import Receipt
from service.jobs.records import Claim, JobCursor, JobFilter, JobRecord, NewJob
from service.jobs.states import JobState
from service.jobs.store import JobStore

RECIPE = {"merge_method": "linear", "models": [{"model": "/models/a"}, {"model": "/models/b"}]}
_outputs = itertools.count()
_priorities = itertools.count(1)


def new_job(**changes: Any) -> NewJob:
    """A job as the API would submit it, with an output of its own."""
    values: dict[str, Any] = {
        "recipe_source": "merge_method: linear\n",
        "recipe": RECIPE,
        "recipe_digest": "sha256:recipe",
        "method": "linear",
        "output_uri": f"/outputs/{next(_outputs)}",
    }
    values |= changes
    return NewJob(**{"methods": (values["method"],), **values})


def tiny_plan(
    output_uri: str = "/outputs/plan",
    *,
    shards: int = 3,
    tensors: int = 2,
    warnings: tuple[str, ...] = (),
) -> Plan:
    """A plan of equal shards; 8 bytes are read and 4 written for each tensor."""
    made = tuple(_shard(index, shards, tensors) for index in range(shards))
    return Plan(
        format=PLAN_FORMAT,
        recipe=RECIPE,
        recipe_digest="sha256:recipe",
        method="linear",
        output_uri=output_uri,
        overwrite=False,
        seed=0,
        threads=1,
        memory_budget=1 << 20,
        check_finite=True,
        inputs=(
            Input("/models/a", "expert", "sha256:a"),
            Input("/models/b", "expert", "sha256:b"),
        ),
        files=(
            SourceFile("/models/a/model.safetensors", 1000, "v1"),
            SourceFile("/models/b/model.safetensors", 1000, "v1"),
        ),
        settings=(Setting("linear"),),
        shards=made,
        config={},
        companions=(),
        warnings=warnings,
        totals=Totals(
            tensors=shards * tensors,
            bytes_read=sum(shard.bytes_read for shard in made),
            bytes_written=sum(shard.size for shard in made),
            flops=0.0,
            max_host_bytes=0,
            max_device_bytes=0,
        ),
    )


def _shard(index: int, shards: int, tensors: int) -> Shard:
    name = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
    problems = tuple(
        Problem(
            tensor_name=f"layer.{index}.{place}",
            shape=(2,),
            dtype="BF16",
            setting=0,
            base=None,
            experts=(Source(0, 0, 4, "BF16"), Source(1, 0, 4, "BF16")),
        )
        for place in range(tensors)
    )
    return Shard(index, name, 4 * tensors, problems)


def receipt_for(plan: Plan, index: int, *, version: str = "w1") -> Receipt:
    """The receipt that a worker would write for a shard."""
    shard = plan.shards[index]
    return Receipt(
        plan_digest=plan.digest,
        shard_index=index,
        file_name=shard.file_name,
        size=shard.size,
        sha256=f"{index:064x}",
        version=version,
        bytes_read=shard.bytes_read,
        read_requests=2,
        peak_buffer_bytes=64,
        seconds={"total": 1.0},
        device="cpu",
        worker="worker-1",
        problems=(),
    )


ERROR = {"type": "/errors/missing_tensor", "code": "missing_tensor", "detail": "It is not there."}
OUTPUT = {"uri": "/outputs/plan", "digest": "sha256:out", "files": []}


def bring_to(store: JobStore, state: JobState, **changes: Any) -> tuple[JobRecord, Claim | None]:
    """A new job in a state, with the claim that brought it there."""
    job, _ = store.submit(new_job(priority=next(_priorities), **changes))
    if state == JobState.QUEUED:
        return job, None
    claim = store.claim("runner-1", 60)
    assert claim is not None
    assert claim.job_id == job.id
    if state in (JobState.RUNNING, JobState.PUBLISHING, JobState.SUCCEEDED):
        store.transition(claim, JobState.RUNNING)
    if state in (JobState.PUBLISHING, JobState.SUCCEEDED):
        store.transition(claim, JobState.PUBLISHING)
    if state in (JobState.CANCELLING, JobState.CANCELLED):
        store.request_cancel(job.id)
    if state == JobState.SUCCEEDED:
        store.transition(claim, state, output={**OUTPUT, "uri": job.output_uri})
    if state == JobState.FAILED:
        store.transition(claim, state, error=ERROR)
    if state == JobState.CANCELLED:
        store.transition(claim, state)
    job = store.get(job.id)
    assert job.state == state
    return job, claim


def listed(
    store: JobStore,
    job_filter: JobFilter | None = None,
    *,
    cursor: JobCursor | None = None,
    limit: int = 20,
) -> list[JobRecord]:
    """Jobs in the order of the list."""
    heads = store.list_heads(job_filter, cursor=cursor, limit=limit)
    jobs = store.get_many([head.id for head in heads])
    assert [(head.revision, head.created_at) for head in heads] == [
        (jobs[head.id].revision, jobs[head.id].created_at) for head in heads
    ]
    return [jobs[head.id] for head in heads]
