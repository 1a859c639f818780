"""What runs in a Ray worker: one shard as a stream of events, the last of which is its end."""

from __future__ import annotations

import queue
import signal
import sys
import threading
from collections.abc import Iterator

import msgspec
import structlog

from merging.errors import WorkerError
from workers.messages import PoolEvent, ShardTask
from workers.ray_wire import Placed
from workers.redact import redact_event
from workers.shard_task import finish_task

_SECONDS_BETWEEN_LOOKS = 0.1


def stream_shard(payload: bytes, engine: str) -> Iterator[bytes]:
    """Do the shard in ``payload`` (a ``ShardTask`` as JSON); yields where, then events, as JSON.

    The engine runs in a thread of its own, so that this one, Ray's, can hand on progress and see
    a cancellation. Ray announces that by an interrupt, which could hit any line of Python; it is
    ignored, and Ray's flag asked instead, so that the engine stops between two pieces with its
    upload aborted.

    Raises:
        WorkerError: ``wrong_version`` if the task is not understood.
    """
    import ray

    try:
        task = msgspec.json.decode(payload, type=ShardTask)
    except msgspec.MsgspecError as error:
        raise WorkerError(
            f"This worker does not understand the shard task ({error})."
            " Run the same version of Mergeyard on the controller and on every Ray node.",
            code="wrong_version",
        ) from None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _log_to_stderr()
    events: queue.SimpleQueue[PoolEvent] = queue.SimpleQueue()
    stop = threading.Event()
    thread = threading.Thread(
        target=lambda: events.put(finish_task(task, events.put, stop.is_set, engine=engine)),
        name="shard",
    )
    thread.start()
    context = ray.get_runtime_context()
    is_cancelled = context.is_canceled
    try:
        yield msgspec.json.encode(Placed(context.get_node_id()))
        while thread.is_alive() or not events.empty():
            if is_cancelled():
                stop.set()
            try:
                event = events.get(timeout=_SECONDS_BETWEEN_LOOKS)
            except queue.Empty:
                continue
            yield msgspec.json.encode(event)
    finally:
        # Ray closes the stream of a cancelled task; the task ends when the engine has stopped.
        stop.set()
        thread.join()


def _log_to_stderr() -> None:
    """Log JSON lines to stderr, which Ray keeps in a file per worker process."""
    if structlog.is_configured():
        return
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            redact_event,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
