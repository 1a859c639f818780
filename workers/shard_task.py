"""One shard task in a worker: calls the engine, reports, and turns every failure into our errors.

No policy lives here: whether a failure is worth another try is for the runner to decide.
"""

from __future__ import annotations

import functools
import os
import pkgutil
import platform
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import structlog

from merging.errors import MergeError, WorkerError
from merging.execute.shard_run import StageNote, describe_device
from merging.rates import storage_kind
from merging.receipts import Receipt, read_receipt
from merging.storage.base import Storage
from merging.storage.router import open_storage
from merging.storage.timed import TimedRequest, timed
from workers.accelerator import choose_device
from workers.messages import (
    PoolEvent,
    ShardDone,
    ShardFailed,
    ShardLog,
    ShardProgress,
    ShardStarted,
    ShardTask,
    StorageTimes,
)
from workers.redact import redact
from workers.shard_spans import begin_spans

ENGINE = "workers.measured:run_shard"
"""Dotted path of the function that produces a shard; resolved in the worker."""

_SECONDS_BETWEEN_PROGRESS = 0.2
_LONGEST_TRACE = 8000


def run_task(
    task: ShardTask,
    emit: Callable[[PoolEvent], None],
    cancelled: Callable[[], bool],
    *,
    engine: str = ENGINE,
    note_storage: TimedRequest,
    note_stage: StageNote | None = None,
) -> Receipt:
    """Do one shard, or return its receipt if it is published already.

    Args:
        task: What to do.
        emit: Receives ``ShardStarted`` and a few ``ShardProgress`` a second.
        cancelled: Asked between steps.
        engine: Dotted path of the engine's function.
        note_storage: Told of each request to storage.
        note_stage: Told how the engine spends its time.

    Raises:
        MergeError: Always one of our own; ``internal`` for what nobody foresaw.
    """
    progress = _Progress(task, emit)
    try:
        device = choose_device(task.device)
        emit(ShardStarted(*_identity(task), worker=_worker(), device=describe_device(device)))
        storage = timed(_storage(task.storage_roots), note_storage)
        work = task.work
        receipt = read_receipt(
            storage, work.output_uri, work.plan_digest, work.shard, work.variants
        )
        if receipt is None:
            run: Callable[..., Receipt] = pkgutil.resolve_name(engine)
            receipt = run(
                work,
                storage,
                device=device,
                on_progress=progress.update,
                cancelled=cancelled,
                on_stage=note_stage,
            )
            progress.flush()
        return receipt
    except MergeError:
        raise
    except Exception as error:
        raise _unexpected(error, task, progress.tensor_name()) from error


def finish_task(
    task: ShardTask,
    emit: Callable[[PoolEvent], None],
    cancelled: Callable[[], bool],
    *,
    engine: str = ENGINE,
) -> ShardDone | ShardFailed:
    """:func:`run_task` with its end as an event, its spans, and a line in the worker's own log."""
    spans = begin_spans(task)
    if spans is None:
        return _finish(task, emit, cancelled, engine)

    def tell(event: PoolEvent) -> None:
        spans.see(event)
        emit(event)

    end = _finish(task, tell, cancelled, engine, spans.note)
    spans.see(end)
    return end


def _finish(
    task: ShardTask,
    emit: Callable[[PoolEvent], None],
    cancelled: Callable[[], bool],
    engine: str,
    note_stage: StageNote | None = None,
) -> ShardDone | ShardFailed:
    log = structlog.get_logger(__name__).bind(
        job_id=task.job_id,
        shard_index=task.work.shard.index,
        attempt=task.attempt,
        traceparent=task.traceparent,
    )
    begin = time.monotonic()
    times = _Times()
    try:
        receipt = run_task(
            task,
            emit,
            cancelled,
            engine=engine,
            note_storage=times.note,
            note_stage=note_stage,
        )
    except MergeError as error:
        log.warning(
            "shard_failed",
            code=error.code,
            detail=error.detail,
            duration_seconds=round(time.monotonic() - begin, 3),
            exc_info=error.__cause__ if error.code == MergeError.default_code else None,
        )
        if error.code == MergeError.default_code:
            emit(ShardLog(*_identity(task), worker=_worker(), text=_trace(error)))
        return ShardFailed(*_identity(task), error=error.to_dict(), storage=times.all())
    log.debug(  # the runner tells it, once for all workers
        "shard_done",
        bytes_read=receipt.bytes_read,
        bytes_written=receipt.bytes_written,
        duration_seconds=round(time.monotonic() - begin, 3),
    )
    return ShardDone(*_identity(task), receipt=receipt, storage=times.all())


class _Times:
    """How long a shard's requests to storage took."""

    def __init__(self) -> None:
        self._seconds: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
        self._lock = threading.Lock()

    def note(self, uri: str, operation: str, outcome: str, seconds: float) -> None:
        """A request was answered."""
        with self._lock:
            self._seconds[storage_kind(uri), operation, outcome].append(round(seconds, 4))

    def all(self) -> tuple[StorageTimes, ...]:
        """What was noted so far."""
        with self._lock:
            return tuple(StorageTimes(*kind, tuple(s)) for kind, s in self._seconds.items())


class _Progress:
    """Passes on a few of the engine's counts a second, and the last ones in any case."""

    def __init__(self, task: ShardTask, emit: Callable[[PoolEvent], None]) -> None:
        self._task = task
        self._emit = emit
        self._latest: Any = None
        self._sent: Any = None
        self._next = 0.0

    def update(self, counts: Any) -> None:
        """Take the engine's counts (``ShardCounts``); called by the thread that solves."""
        self._latest = counts
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _SECONDS_BETWEEN_PROGRESS
            self.flush()

    def flush(self) -> None:
        """Send the latest counts if they have not been sent."""
        counts = self._latest
        if counts is self._sent:
            return
        self._sent = counts
        self._emit(
            ShardProgress(
                *_identity(self._task),
                tensors_fetched=counts.tensors_fetched,
                tensors_solved=counts.tensors_solved,
                tensors_written=counts.tensors_written,
                bytes_read=counts.bytes_read,
                bytes_written=counts.bytes_written,
                worker=_worker(),
            )
        )

    def tensor_name(self) -> str | None:
        """The tensor that is being solved: problems are solved in file order."""
        problems = self._task.work.shard.problems
        solved = self._latest.tensors_solved if self._latest is not None else 0
        return problems[solved].tensor_name if solved < len(problems) else None


@functools.lru_cache(maxsize=8)
def _storage(roots: tuple[str, ...]) -> Storage:
    """One storage per process and set of roots, so that connections outlive a task."""
    return open_storage(roots)


def _identity(task: ShardTask) -> tuple[str, int, int]:
    return (task.job_id, task.work.shard.index, task.attempt)


def _worker() -> str:
    return f"{platform.node()}:{os.getpid()}"


def _unexpected(error: Exception, task: ShardTask, tensor_name: str | None) -> MergeError:
    where = f"shard {task.work.shard.index} ({task.work.shard.file_name})"
    context: dict[str, object] = {"file_name": task.work.shard.file_name, "worker": _worker()}
    if tensor_name is not None:
        where = f"tensor {tensor_name!r} of {where}"
        context["tensor_name"] = tensor_name
    if _is_out_of_memory(error):
        return WorkerError(
            f"Memory ran out at {where}. Plan with a smaller memory_budget (device_memory_budget"
            " on a GPU), or give each task more memory (fewer tasks per machine or per GPU).",
            code="out_of_memory",
            context=context,
        )
    return MergeError(
        f"An unexpected {type(error).__name__} stopped {where}; this is a defect of Mergeyard."
        " The job's log has the trace.",
        context=context,
    )


def _trace(error: MergeError) -> str:
    """Where it happened; the end of it if it is long."""
    cause = error.__cause__ or error
    return redact("".join(traceback.format_exception(cause)))[-_LONGEST_TRACE:]


def _is_out_of_memory(error: Exception) -> bool:
    # Compared by name and text, since torch has no common class: CUDA raises its own
    # OutOfMemoryError and the CPU allocator a plain RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )
