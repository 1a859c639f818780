"""What a job store says of workers, from the shards that they took up."""

from __future__ import annotations

from datetime import timedelta

from service.jobs.sql_store import SqlJobStore
from service.jobs.states import JobState, ShardState
from tests.support.jobs import bring_to, receipt_for, tiny_plan


def test_workers_are_known_by_what_they_have_and_have_done(store: SqlJobStore) -> None:
    job, claim = bring_to(store, JobState.PLANNING)
    assert claim is not None
    plan = tiny_plan(job.output_uri)
    store.save_plan(claim, plan)
    store.transition(claim, JobState.RUNNING)
    for index, worker in ((0, "a:1"), (1, "a:1"), (2, "b:7")):
        store.record_shard(
            claim, index, ShardState.RUNNING, attempt=1, worker=worker, device="cuda:0 NVIDIA"
        )
    receipt = {"size": receipt_for(plan, 0).size}
    store.record_shard(claim, 0, ShardState.SUCCEEDED, attempt=1, receipt=receipt)
    store.record_shard(claim, 2, ShardState.SUCCEEDED, attempt=1, receipt=receipt)
    started_at = store.shards(job.id)[1].started_at
    finished_at = store.shards(job.id)[2].finished_at
    assert started_at is not None
    assert finished_at is not None
    busy, idle = store.workers(started_at - timedelta(hours=1))
    assert (busy.worker, busy.job_id, busy.shard_index) == ("a:1", job.id, 1)
    assert (busy.started_at, busy.device) == (started_at, "cuda:0 NVIDIA")
    assert (busy.shards_done, busy.bytes_done) == (1, 24)  # 2 tensors: 8 bytes read, 4 written each
    assert (idle.worker, idle.job_id, idle.last_seen_at) == ("b:7", None, finished_at)
    later = store.workers(finished_at + timedelta(seconds=1))
    assert [worker.worker for worker in later] == ["a:1"]
    store.transition(claim, JobState.FAILED, error={"code": "internal"})
    assert store.workers(finished_at + timedelta(seconds=1)) == []
