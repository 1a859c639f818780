"""How a job goes from its claim to its end when nobody interferes."""

from __future__ import annotations

import itertools

from merging.errors import CheckpointError, MergeError, StorageError, WorkerError
from merging.publish import INDEX_NAME
from service.jobs.states import JobState, ShardState
from tests.support.fake_pool import FakePool
from tests.support.runner_bench import NUM_SHARDS, NUM_TENSORS, Bench, write_checkpoint
from workers.messages import ShardTask


def lost(_task: ShardTask) -> MergeError:
    return WorkerError("The worker was lost.", retryable=True)


def test_a_job_succeeds_and_says_so_once(bench: Bench) -> None:
    job = bench.submit()
    (done,) = bench.runner().finish(job)
    assert done.state == JobState.SUCCEEDED
    assert done.output
    assert done.output["uri"] == job.output_uri
    assert [file["name"] for file in done.output["files"]] == [
        f"model-{number:05d}-of-{NUM_SHARDS:05d}.safetensors" for number in (1, 2, 3)
    ]
    progress = done.progress
    assert (progress.shards_done, progress.shards_total) == (NUM_SHARDS, NUM_SHARDS)
    assert (progress.tensors_done, progress.tensors_total) == (NUM_TENSORS, NUM_TENSORS)
    assert progress.bytes_done == progress.bytes_total > 0
    assert [phase.name for phase in done.phases] == [
        "reading_headers",
        "checking_output",
        "waiting_for_workers",
        "merging",
        "publishing",
    ]
    assert done.started_at
    assert done.finished_at
    assert done.lease_owner is None
    names = bench.output(job)
    assert INDEX_NAME in names
    assert not any(name.startswith(".mergeyard") for name in names)


def test_everything_that_happened_can_be_read_from_the_events(bench: Bench) -> None:
    job = bench.submit()
    bench.runner().finish(job)
    changes = [
        (event.data["from"], event.data["to"])
        for event in bench.store.events(job.id)
        if event.type == "job.state_changed"
    ]
    assert changes == [
        ("queued", "planning"),
        ("planning", "running"),
        ("running", "publishing"),
        ("publishing", "succeeded"),
    ]
    kinds = [str(event.type) for event in bench.store.events(job.id)]
    assert kinds.count("shard.started") == kinds.count("shard.finished") == NUM_SHARDS
    assert kinds[-3:] == ["job.output_committed", "job.state_changed", "job.finished"]


def test_receipts_and_the_report_are_kept_with_the_job(bench: Bench) -> None:
    job = bench.submit()
    bench.runner().finish(job)
    report = bench.store.load_report(job.id)
    assert report
    assert report["plan_digest"] == bench.store.get(job.id).plan_digest
    for shard in bench.store.shards(job.id):
        assert shard.state == ShardState.SUCCEEDED
        assert shard.receipt
        assert shard.receipt["file_name"] == shard.file_name
        assert "problems" not in shard.receipt
        assert shard.tensors_written == shard.tensors_total == 2
        assert (shard.worker, shard.device) == ("worker-1", "cpu")


def test_a_lost_worker_costs_a_retry(bench: Bench) -> None:
    job = bench.submit()
    pool = FakePool(
        bench.storage,
        script=lambda task: lost(task) if (task.work.shard.index, task.attempt) == (1, 1) else None,
    )
    (done,) = bench.runner(pool).finish(job)
    assert done.state == JobState.SUCCEEDED
    assert pool.indexes(job.id).count(1) == 2
    (retried,) = [e for e in bench.store.events(job.id) if e.type == "shard.retried"]
    assert retried.data["shard_index"] == 1
    assert retried.data["error"]["code"] == "worker_lost"
    assert [shard.attempt for shard in bench.store.shards(job.id)] == [1, 2, 1]


def test_retries_wait_longer_each_time_and_hold_nothing_up(bench: Bench) -> None:
    job = bench.submit()
    handed_out: list[tuple[float, int]] = []

    def script(task: ShardTask) -> MergeError | None:
        handed_out.append((bench.clock.monotonic(), task.work.shard.index))
        return lost(task) if task.work.shard.index == 0 and task.attempt < 4 else None

    bench.runner(FakePool(bench.storage, script=script)).finish(job)
    times = [time for time, index in handed_out if index == 0]
    waits = [later - sooner for sooner, later in itertools.pairwise(times)]
    assert len(waits) == 3
    assert waits[0] >= 1
    assert waits[1] >= 2
    assert waits[2] >= 4
    assert all(time < times[1] for time, index in handed_out if index != 0)


def test_a_shard_that_fails_too_often_fails_its_job(bench: Bench) -> None:
    job = bench.submit()
    pool = FakePool(
        bench.storage, script=lambda task: lost(task) if task.work.shard.index == 1 else None
    )
    (done,) = bench.runner(pool, max_tries=3).finish(job)
    assert done.state == JobState.FAILED
    assert done.error
    assert done.error["code"] == "worker_lost"
    assert done.error["context"]["shard_index"] == 1
    assert pool.indexes(job.id).count(1) == 3
    kinds = [str(event.type) for event in bench.store.events(job.id)]
    assert kinds.count("shard.retried") == 2
    assert bench.store.shards(job.id)[1].state == ShardState.FAILED


def test_what_no_retry_can_help_fails_the_job_at_once_and_names_the_tensor(bench: Bench) -> None:
    job = bench.submit()
    name = "model.layers.0.input_layernorm.weight"
    bad = CheckpointError("NaN.", code="non_finite_input", context={"tensor_name": name})
    pool = FakePool(bench.storage, script=lambda _task: bad)
    (done,) = bench.runner(pool).finish(job)
    assert done.state == JobState.FAILED
    assert done.error
    assert (done.error["code"], done.error["context"]["tensor_name"]) == ("non_finite_input", name)
    assert [task.attempt for task in pool.submitted] == [1] * len(pool.submitted)
    assert not any(e.type == "shard.retried" for e in bench.store.events(job.id))
    assert INDEX_NAME not in bench.output(job)


def test_a_failing_job_ends_only_when_nothing_of_it_is_in_flight(bench: Bench) -> None:
    job = bench.submit()
    bad = StorageError("The disk is full.", code="no_space")
    pool = FakePool(bench.storage, slots=2)
    pool.holding = pool.stubborn = True
    runner = bench.runner(pool, grace_seconds=5)
    runner.turn_until(lambda: len(pool.in_flight) == NUM_SHARDS)
    first = pool.in_flight[0]
    pool._end(first, bad)
    runner.turn(4)
    assert pool.cancels == [(job.id, False)]
    assert bench.store.get(job.id).state == JobState.RUNNING
    (done,) = runner.finish(job)
    assert pool.cancels == [(job.id, False), (job.id, True)]
    assert done.error
    assert done.error["code"] == "no_space"


def test_a_source_that_changes_during_the_merge_fails_it(bench: Bench) -> None:
    job = bench.submit()
    runner = bench.runner()
    runner.pool.holding = True
    runner.turn_until(lambda: runner.pool.in_flight)
    write_checkpoint(bench.storage, "mem://models/b", fill=b"\1")
    runner.pool.holding = False
    (done,) = runner.finish(job)
    assert done.state == JobState.FAILED
    assert done.error
    assert done.error["code"] == "source_changed"
    assert INDEX_NAME not in bench.output(job)


def test_a_recipe_that_cannot_be_planned_fails_with_its_faults(bench: Bench) -> None:
    job = bench.submit()
    bench.storage.delete("mem://models/b/model.safetensors")
    (done,) = bench.runner().finish(job)
    assert done.state == JobState.FAILED
    assert done.error
    assert "mem://models/b" in str(done.error)
    assert bench.store.load_plan(job.id) is None


def test_planning_is_tried_again_when_storage_was_away(bench: Bench) -> None:
    job = bench.submit()
    runner = bench.runner()
    storage_list, failures = bench.storage.list, [StorageError("Away.", retryable=True)] * 2

    def shaky_list(prefix: str) -> object:
        if failures:
            raise failures.pop()
        return storage_list(prefix)

    bench.storage.list = shaky_list  # type: ignore[method-assign]
    (done,) = runner.finish(job)
    assert done.state == JobState.SUCCEEDED
    assert failures == []


def test_an_output_that_holds_a_checkpoint_is_not_touched(bench: Bench) -> None:
    first = bench.submit()
    bench.runner().finish(first)
    before = bench.storage.list(first.output_uri)
    second = bench.submit(output_uri=first.output_uri)
    (done,) = bench.runner().finish(second)
    assert done.error
    assert done.error["code"] == "output_exists"
    assert bench.storage.list(first.output_uri) == before


def test_a_retry_of_a_failed_job_reuses_its_shards(bench: Bench) -> None:
    job = bench.submit()
    bad = CheckpointError("Broken.", code="header_invalid")
    pool = FakePool(bench.storage, script=lambda task: bad if task.work.shard.index == 2 else None)
    bench.runner(pool, max_in_flight_shards=1).finish(job)
    bench.store.retry(job.id)
    again = bench.runner()
    again.turn_until(lambda: bench.store.get(job.id).is_terminal)
    assert bench.store.get(job.id).state == JobState.SUCCEEDED
    assert again.pool.indexes(job.id) == [2]
    kinds = [str(event.type) for event in bench.store.events(job.id)]
    assert kinds.count("job.finished") == 2  # one for each attempt


def test_a_fault_of_the_service_costs_only_the_job_that_met_it(bench: Bench) -> None:
    broken = bench.submit(options={"max_shard_size": "nonsense"})
    fine = bench.submit()
    one, other = bench.runner().finish(broken, fine)
    assert one.state == JobState.FAILED
    assert one.error
    assert one.error["code"] == "internal"
    assert "nonsense" not in str(one.error)
    assert other.state == JobState.SUCCEEDED


def test_progress_is_told_once_a_second_with_the_counts_of_shards(bench: Bench) -> None:
    job = bench.submit()
    runner = bench.runner()
    pool = runner.pool
    pool.holding = True
    runner.turn_until(lambda: len(pool.in_flight) == NUM_SHARDS)
    runner.turn(3)
    first = pool.in_flight[0]
    before = bench.store.get(job.id).event_seq
    for tensors in (1, 1, 2, 2):
        pool.report_progress(first, tensors)
        runner.turn()  # half a second
    told = [e for e in bench.store.events(job.id, after=before) if e.type == "job.progress"]
    assert [event.data["shards"] for event in told] == [[[0, 1, 1, 1]], [[0, 2, 2, 2]]]
    assert bench.store.get(job.id).progress.bytes_done > 0
    assert bench.store.get(job.id).estimated_finish_at is not None
    quiet = bench.store.get(job.id).event_seq
    runner.turn(10)
    assert bench.store.get(job.id).event_seq <= quiet + 1
    pool.holding = False
    (done,) = runner.finish(job)
    assert done.estimated_finish_at is None


def test_progress_of_a_long_job_is_told_ever_more_rarely_but_always_fresh(bench: Bench) -> None:
    job = bench.submit()
    runner = bench.runner()
    pool = runner.pool
    pool.holding = True
    runner.turn_until(lambda: len(pool.in_flight) == NUM_SHARDS)

    def told_in(turns: int, pause: float) -> int:
        """Events of progress while the job gets on with each pause."""
        before = bench.store.get(job.id).event_seq
        for turn in range(turns):
            pool.report_progress(pool.in_flight[turn % 2], 1 + turn // 2 % 2)
            bench.clock.advance(pause)
            runner.turn()
        assert bench.store.get(job.id).progress.shards_total == NUM_SHARDS
        events = bench.store.events(job.id, after=before)
        return [str(event.type) for event in events].count("job.progress")

    assert told_in(40, 0.5) == 40
    bench.clock.advance(20)
    runner.runner.heartbeat.beat()
    told_in(300, 20.0)
    assert 9 <= told_in(120, 0.5) <= 12  # 6,000 seconds later: 12 s apart
    events = bench.store.events(job.id, limit=10_000)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    pool.holding = False
    runner.finish(job)


def test_lost_work_does_not_let_progress_go_back(bench: Bench) -> None:
    job = bench.submit()
    runner = bench.runner()
    pool = runner.pool
    pool.holding = True
    runner.turn_until(lambda: len(pool.in_flight) == NUM_SHARDS)
    pool.report_progress(pool.in_flight[0], 2)
    runner.turn(4)
    reached = bench.store.get(job.id).progress
    assert reached.bytes_done > 0
    pool.fail_all(WorkerError("Lost.", retryable=True))
    runner.turn(4)
    assert bench.store.get(job.id).progress.bytes_done >= reached.bytes_done
    pool.holding = False
    runner.finish(job)
