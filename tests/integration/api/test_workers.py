"""Workers over HTTP."""

from __future__ import annotations

from service.jobs.states import JobState, ShardState
from tests.support.api import LiveApi
from tests.support.jobs import tiny_plan


def test_a_worker_is_shown_with_the_shard_that_it_has(api: LiveApi) -> None:
    job, claim = api.bring_to(JobState.PLANNING)
    assert claim is not None
    api.store.save_plan(claim, tiny_plan(job.output_uri))
    api.store.transition(claim, JobState.RUNNING)
    api.store.record_shard(
        claim, 1, ShardState.RUNNING, attempt=1, worker="node-1:42", device="cuda:0 NVIDIA H100"
    )
    body = api.admin.get("/v1/workers?within_seconds=60").json()
    (worker,) = [item for item in body["data"] if item["id"] == "node-1:42"]
    started_at = worker["task"].pop("started_at")
    assert worker == {
        "object": "worker",
        "id": "node-1:42",
        "node": "node-1",
        "device": "cuda:0 NVIDIA H100",
        "is_busy": True,
        "task": {
            "job_id": job.id,
            "shard_index": 1,
            "file_name": "model-00002-of-00003.safetensors",
        },
        "shards_done": 0,
        "bytes_done": 0,
        "last_seen_at": started_at,
    }
