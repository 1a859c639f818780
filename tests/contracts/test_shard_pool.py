"""What every pool promises; one body over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from merging.plan.packing import shard_header
from merging.plan.plan import (
    COPY,
    PLAN_FORMAT,
    Problem,
    Setting,
    Shard,
    ShardWork,
    Source,
    SourceFile,
)
from merging.receipts import read_receipt, write_receipt
from merging.storage.router import open_storage
from tests.support.checkpoints import write_checkpoint
from tests.support.pools import collect, ends, fail, finish, has_seen, words
from tests.support.stub_engine import ENGINE, make_receipt, make_task
from workers.local_pool import LocalPool
from workers.messages import (
    ShardDone,
    ShardFailed,
    ShardLog,
    ShardProgress,
    ShardStarted,
    ShardTask,
)
from workers.pool import ShardPool
from workers.ray_pool import RayPool
from workers.ray_wire import RayOptions

pytest_plugins = ["tests.support.ray_fixtures"]

RAY = pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])


@pytest.fixture(params=["local", RAY])
def pool(request: pytest.FixtureRequest) -> Iterator[ShardPool]:
    """An idle pool with two slots."""
    if request.param == "ray":
        yield request.getfixturevalue("ray_pool")
        return
    local = LocalPool(2, engine=ENGINE)
    yield local
    local.close()


@pytest.fixture(params=["local", RAY])
def real_pool(request: pytest.FixtureRequest) -> Iterator[ShardPool]:
    """A pool that runs the engine itself."""
    pool: ShardPool = LocalPool()
    if request.param == "ray":
        ray_pool: RayPool = request.getfixturevalue("ray_pool")
        options: RayOptions = request.getfixturevalue("ray_options")
        pool = RayPool(RayOptions(address=ray_pool.address, token_path=options.token_path))
    yield pool
    pool.close()


@pytest.fixture(params=["local", RAY])
def fresh_pool(request: pytest.FixtureRequest) -> ShardPool:
    """A pool that the test closes."""
    if request.param == "ray":
        start: Callable[[], RayPool] = request.getfixturevalue("start_ray")
        return start()
    return LocalPool(2, engine=ENGINE)


def test_every_task_ends_once(pool: ShardPool, tmp_path: Path) -> None:
    tasks = [make_task("ends", n, output=tmp_path) for n in range(5)]
    tasks.append(make_task("ends", 5, output=tmp_path, fail="defect"))
    for task in tasks:
        pool.submit(task)
    events = finish(pool, len(tasks))
    found = {end.shard_index: type(end) for end in ends(events)}
    assert len(ends(events)) == len(tasks)
    assert found == dict.fromkeys(range(5), ShardDone) | {5: ShardFailed}
    assert pool.poll(0) == []


def test_slots_are_those_of_the_pool(pool: ShardPool) -> None:
    assert pool.slots() == 2


def test_a_shard_starts_then_progresses_forward_then_ends(pool: ShardPool, tmp_path: Path) -> None:
    task = make_task("order", 7, attempt=3, output=tmp_path, steps=50)
    pool.submit(task)
    events = finish(pool)
    assert {(e.job_id, e.shard_index, e.attempt) for e in events} == {("order", 7, 3)}
    started, *progress, done = events
    assert isinstance(started, ShardStarted)
    assert started.device == "cpu"
    assert isinstance(done, ShardDone)
    assert done.receipt.file_name == task.work.shard.file_name
    counts = [
        (p.tensors_fetched, p.tensors_solved, p.tensors_written, p.bytes_read, p.bytes_written)
        for p in progress
        if isinstance(p, ShardProgress)
    ]
    assert len(counts) == len(progress)
    assert counts == sorted(counts)
    assert counts[-1] == (50, 50, 50, 200, 200)


def test_an_orderly_cancel_lets_the_engine_clean_up_first(pool: ShardPool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    pool.submit(make_task("orderly", output=tmp_path, hold=str(tmp_path / "never"), log=str(log)))
    collect(pool, has_seen(ShardProgress, "orderly"))
    pool.cancel("orderly")
    assert fail(pool).error["code"] == "cancelled"
    assert words(log) == ["started", "aborted"]


def test_cancel_now_ends_a_task(pool: ShardPool, tmp_path: Path) -> None:
    pool.submit(make_task("now", output=tmp_path, hold=str(tmp_path / "never")))
    collect(pool, has_seen(ShardProgress, "now"))
    pool.cancel("now", now=True)
    assert fail(pool).error["code"] == "cancelled"


def test_cancel_now_follows_an_orderly_one(pool: ShardPool, tmp_path: Path) -> None:
    pool.submit(make_task("both", output=tmp_path, hold=str(tmp_path / "never")))
    collect(pool, has_seen(ShardProgress, "both"))
    pool.cancel("both")
    pool.cancel("both", now=True)
    assert fail(pool).error["code"] == "cancelled"


def test_cancel_right_after_submit_is_not_lost(pool: ShardPool, tmp_path: Path) -> None:
    pool.submit(make_task("early", output=tmp_path, hold=str(tmp_path / "never")))
    pool.cancel("early")
    assert fail(pool).error["code"] == "cancelled"


@pytest.mark.parametrize("now", [False, True])
def test_cancel_reaches_tasks_that_wait_for_a_slot(
    pool: ShardPool, tmp_path: Path, now: bool
) -> None:
    job = f"waiting-{now}"
    for n in range(5):
        pool.submit(make_task(job, n, output=tmp_path, hold=str(tmp_path / "never")))
    collect(pool, has_seen(ShardProgress, job))
    pool.cancel(job, now=now)
    events = finish(pool, 5)
    assert sorted(end.shard_index for end in ends(events)) == [0, 1, 2, 3, 4]
    assert [end.error["code"] for end in ends(events) if isinstance(end, ShardFailed)] == [
        "cancelled"
    ] * 5


def test_jobs_run_beside_each_other_and_are_cancelled_apart(
    pool: ShardPool, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    pool.submit(make_task("stays", output=tmp_path, hold=str(gate)))
    pool.submit(make_task("goes", output=tmp_path, hold=str(tmp_path / "never")))
    collect(
        pool,
        lambda events: (
            has_seen(ShardProgress, "stays")(events) and has_seen(ShardProgress, "goes")(events)
        ),
    )
    pool.cancel("goes")
    assert fail(pool).job_id == "goes"
    gate.touch()
    (end,) = ends(finish(pool))
    assert isinstance(end, ShardDone)
    assert end.job_id == "stays"


def test_a_cancelled_shard_can_be_submitted_again(pool: ShardPool, tmp_path: Path) -> None:
    pool.submit(make_task("again", output=tmp_path, hold=str(tmp_path / "never")))
    collect(pool, has_seen(ShardProgress, "again"))
    pool.cancel("again")
    fail(pool)
    pool.submit(make_task("again", attempt=2, output=tmp_path))
    (end,) = ends(finish(pool))
    assert isinstance(end, ShardDone)
    assert end.attempt == 2


def test_an_error_of_ours_arrives_whole(pool: ShardPool, tmp_path: Path) -> None:
    pool.submit(make_task("ours", output=tmp_path, fail="checkpoint"))
    assert fail(pool).error == {
        "type": "CheckpointError",
        "code": "missing_tensor",
        "detail": "A tensor is missing.",
        "retryable": False,
        "faults": [],
        "context": {"uri": "x"},
    }


def test_a_defect_names_the_tensor_and_shows_its_trace_in_the_log_only(
    pool: ShardPool, tmp_path: Path
) -> None:
    pool.submit(make_task("defect", output=tmp_path, fail="defect"))
    *_, said, failed = finish(pool)
    assert isinstance(said, ShardLog)
    assert said.text.startswith("Traceback")
    assert "secret detail" in said.text
    assert isinstance(failed, ShardFailed)
    error = failed.error
    assert error["code"] == "internal"
    assert error["retryable"] is False
    assert error["context"]["tensor_name"] == "layer.1"  # type: ignore[index]
    assert "ValueError" in str(error["detail"])
    assert "Traceback" not in str(error)
    assert "secret detail" not in str(error)


def test_running_out_of_memory_names_the_tensor(pool: ShardPool, tmp_path: Path) -> None:
    pool.submit(make_task("memory", output=tmp_path, fail="memory"))
    error = fail(pool).error
    assert (error["type"], error["code"]) == ("WorkerError", "out_of_memory")
    assert "'layer.1'" in str(error["detail"])


def test_a_gpu_that_is_not_there_is_a_clear_error(pool: ShardPool, tmp_path: Path) -> None:
    task = make_task("gpu", output=tmp_path)
    pool.submit(ShardTask(task.job_id, task.attempt, task.work, device="cuda:99"))
    assert fail(pool).error["code"] == "device_unavailable"


def test_a_shard_outside_the_storage_roots_is_refused(pool: ShardPool, tmp_path: Path) -> None:
    task = make_task("roots", output=tmp_path / "outside")
    (tmp_path / "inside").mkdir()
    roots = (str(tmp_path / "inside"),)
    pool.submit(ShardTask(task.job_id, task.attempt, task.work, roots, "cpu"))
    assert fail(pool).error["code"] == "uri_not_allowed"


def test_a_published_shard_is_not_done_again(pool: ShardPool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    task = make_task("published", output=tmp_path, log=str(log))
    work = task.work
    storage = open_storage()
    version = storage.write_bytes(f"{work.output_uri}/{work.shard.file_name}", b"weights").version
    receipt = make_receipt(work, version=version)
    write_receipt(storage, work.output_uri, receipt)
    pool.submit(task)
    (end,) = ends(finish(pool))
    assert isinstance(end, ShardDone)
    assert end.receipt == receipt
    assert not log.exists()


def test_the_same_shard_is_not_taken_twice(pool: ShardPool, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    task = make_task("twice", output=tmp_path, hold=str(gate))
    pool.submit(task)
    with pytest.raises(ValueError, match="in flight already"):
        pool.submit(task)
    gate.touch()
    assert len(ends(finish(pool))) == 1


def test_cancelling_an_unknown_job_does_nothing(pool: ShardPool) -> None:
    pool.cancel("nobody")
    assert pool.poll(0) == []


def test_the_engine_itself_produces_a_shard(real_pool: ShardPool, tmp_path: Path) -> None:
    weights = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    source = tmp_path / "expert" / "model.safetensors"
    write_checkpoint(source.parent, {"layer.weight": weights})
    end = source.stat().st_size
    version = open_storage().stat(str(source)).version
    entry = Source(0, end - weights.nbytes, end, "F32")
    problem = Problem("layer.weight", (3, 4), "F32", 0, None, (entry,), host_bytes=1024)
    work = ShardWork(
        format=PLAN_FORMAT,
        plan_digest="sha256:" + "0" * 64,
        output_uri=str(tmp_path / "merged"),
        shard=Shard(0, "model.safetensors", 0, (problem,)),
        files=(SourceFile(str(source), end, version),),
        settings=(Setting(COPY),),
        seed=0,
        threads=1,
        memory_budget=1 << 20,
        check_finite=True,
    )
    size = len(shard_header((problem,))) + weights.nbytes
    work = msgspec.structs.replace(work, shard=msgspec.structs.replace(work.shard, size=size))
    real_pool.submit(ShardTask("real", 1, work, (str(tmp_path),), "cpu"))
    (done,) = ends(finish(real_pool))
    assert isinstance(done, ShardDone), done
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["layer.weight"], weights)
    stored = read_receipt(open_storage(), work.output_uri, work.plan_digest, work.shard)
    assert done.receipt == stored
    timed = {(times.backend, times.operation, times.outcome) for times in done.storage}
    assert {("file", "read_into", "ok"), ("file", "write_bytes", "ok")} <= timed
    assert all(seconds >= 0 for times in done.storage for seconds in times.seconds)


def test_close_cancels_what_is_in_flight_and_may_be_repeated(
    fresh_pool: ShardPool, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    for n in range(3):
        fresh_pool.submit(
            make_task("closing", n, output=tmp_path, hold=str(tmp_path / "never"), log=str(log))
        )
    collect(fresh_pool, has_seen(ShardProgress, "closing"))
    fresh_pool.close()
    fresh_pool.close()
    events = ends(finish(fresh_pool, 3))
    assert [event.error["code"] for event in events if isinstance(event, ShardFailed)] == [
        "cancelled"
    ] * 3
    assert words(log).count("started") == words(log).count("aborted")
