"""An engine without numbers, for tests of pools: does what the task's parameters say.

Parameters of the first setting: ``steps``; ``hold``, a file for whose appearance the task waits
after its first step; ``log``, a file that gets a line at the start and at the end; ``fail``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merging.errors import Cancelled, CheckpointError
from merging.execute.shard_run import ShardCounts
from merging.plan.plan import PLAN_FORMAT, Problem, Setting, Shard, ShardWork
from merging.receipts import Receipt
from workers.messages import ShardTask

ENGINE = "tests.support.stub_engine:run_stub"


def make_task(
    job_id: str, index: int = 0, *, attempt: int = 1, output: Path, **parameters: Any
) -> ShardTask:
    """A task for :func:`run_stub`."""
    steps = parameters.setdefault("steps", 3)
    problems = tuple(Problem(f"layer.{n}", (1,), "F32", 0, None, ()) for n in range(steps))
    shard = Shard(index, f"model-{index:05d}.safetensors", 4 * steps, problems)
    work = ShardWork(
        format=PLAN_FORMAT,
        plan_digest="sha256:" + "0" * 64,
        output_uri=str(output / job_id),
        shard=shard,
        files=(),
        settings=(Setting("stub", parameters),),
        seed=0,
        threads=1,
        memory_budget=1 << 20,
        check_finite=True,
    )
    return ShardTask(job_id, attempt, work, device="cpu")


def make_receipt(work: ShardWork, *, version: str = "") -> Receipt:
    """What :func:`run_stub` returns; ``worker`` is the process id."""
    return Receipt(
        plan_digest=work.plan_digest,
        shard_index=work.shard.index,
        file_name=work.shard.file_name,
        size=work.shard.size,
        sha256="0" * 64,
        version=version,
        bytes_read=0,
        read_requests=0,
        peak_buffer_bytes=0,
        seconds={},
        device="cpu",
        worker=str(os.getpid()),
        problems=(),
    )


def run_stub(
    work: ShardWork,
    storage: object,
    *,
    device: str,
    on_progress: Callable[[ShardCounts], None],
    cancelled: Callable[[], bool],
    on_stage: object,
) -> Receipt:
    """Stands in for :func:`merging.execute.shard.run_shard`."""
    parameters = work.settings[0].parameters
    _write(parameters, "started")
    for step in range(parameters["steps"]):
        on_progress(ShardCounts(step + 1, step + 1, step + 1, 4 * step + 4, 4 * step + 4))
        _stop_if(cancelled, parameters)
        while step == 0 and "hold" in parameters and not Path(parameters["hold"]).exists():
            threading.Event().wait(0.01)  # a pause in which another process makes the file
            _stop_if(cancelled, parameters)
        _fail(parameters.get("fail"))
    _write(parameters, "finished")
    return make_receipt(work)


def _stop_if(cancelled: Callable[[], bool], parameters: dict[str, Any]) -> None:
    if cancelled():
        _write(parameters, "aborted")
        raise Cancelled("Stopped.")


def _fail(kind: str | None) -> None:
    if kind == "checkpoint":
        raise CheckpointError("A tensor is missing.", code="missing_tensor", context={"uri": "x"})
    if kind == "memory":
        raise MemoryError
    if kind == "defect":
        raise ValueError("secret detail")


def _write(parameters: dict[str, Any], word: str) -> None:
    if "log" in parameters:
        with Path(parameters["log"]).open("a") as log:
            log.write(f"{word} {os.getpid()}\n")
