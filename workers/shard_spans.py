"""Spans of one try at a shard in a worker: the try itself, and below it each of its stages.

Nothing here can fail or hold up a merge: without the packages there are no spans, and a collector
that does not answer is not waited for.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from merging.roles import describe_tensor
from workers.messages import (
    PoolEvent,
    ShardDone,
    ShardFailed,
    ShardProgress,
    ShardStarted,
    ShardTask,
)
from workers.redact import redact
from workers.tracing import Tracing, end_span, open_tracing

if TYPE_CHECKING:
    from opentelemetry.util.types import AttributeValue


def begin_spans(task: ShardTask) -> ShardSpans | None:
    """The spans of this try, if the task says where to send them."""
    tracing = None if task.otlp_endpoint is None else _tracing(task.otlp_endpoint)
    return None if tracing is None else ShardSpans(tracing, task)


@dataclass(slots=True)
class _Stretch:
    """From when to when a shard was at a stage (nanoseconds since 1970), and how long in all."""

    begin: int
    end: int
    seconds: float = 0.0


class ShardSpans:
    """The span of a try, told what happens by :meth:`note` and :meth:`see`.

    Args:
        tracing: Makes spans.
        task: Which try, and the span that it belongs to.
    """

    def __init__(self, tracing: Tracing, task: ShardTask) -> None:
        from opentelemetry.trace import SpanKind

        self._tracing = tracing
        self._span = tracing.begin("attempt", task.traceparent, _facts(task), kind=SpanKind.SERVER)
        self._epoch = time.time_ns() - time.perf_counter_ns()
        self._stages: dict[str, _Stretch] = {}
        self._counts: dict[str, dict[str, AttributeValue]] = {}

    def note(self, stage: str, seconds: float) -> None:
        """The shard was at a stage for that long until now: a ``StageNote`` of the engine."""
        end = self._epoch + time.perf_counter_ns()
        stretch = self._stages.setdefault(stage, _Stretch(end - int(seconds * 1e9), end))
        stretch.end = end
        stretch.seconds += seconds

    def see(self, event: PoolEvent) -> None:
        """Learn from what the pool is told; the end of the try ends its spans and sends them."""
        if isinstance(event, ShardStarted):
            self._span.set_attributes({"worker": event.worker, "device": event.device})
        elif isinstance(event, ShardProgress):
            self._counts = {
                "fetch": {"bytes_read": event.bytes_read},
                "solve": {"tensors_solved": event.tensors_solved},
                "write": {"bytes_written": event.bytes_written},
            }
        elif isinstance(event, (ShardDone, ShardFailed)):
            error = event.error if isinstance(event, ShardFailed) else None
            self._end_stages()
            end_span(self._span, error)
            self._tracing.flush()

    def _end_stages(self) -> None:
        for counts in self._counts.values():
            self._span.set_attributes(counts)
        for name, stretch in self._stages.items():
            counts = {"seconds": round(stretch.seconds, 6), **self._counts.get(name, {})}
            span = self._tracing.begin(name, self._span, counts, at=stretch.begin)
            span.end(stretch.end)


def _facts(task: ShardTask) -> dict[str, AttributeValue]:
    """What is known of a try before it begins."""
    shard = task.work.shard
    facts: dict[str, AttributeValue] = {
        "job_id": task.job_id,
        "shard_index": shard.index,
        "attempt": task.attempt,
        "file_name": shard.file_name,
        "tensors": len(shard.problems),
    }
    roles = (describe_tensor(each.tensor_name, each.shape, {}) for each in shard.problems)
    layers = [role.layer for role in roles if role.layer >= 0]
    if layers:
        facts |= {"first_layer": min(layers), "last_layer": max(layers)}
    return facts


@functools.lru_cache(maxsize=8)
def _tracing(endpoint: str) -> Tracing | None:
    """One per process and endpoint, so that connections outlive a task."""
    from importlib import metadata

    try:
        return open_tracing(endpoint, metadata.version("mergeyard"), "mergeyard-worker")
    except Exception as error:  # noqa: BLE001 - packages or settings of this machine's
        structlog.get_logger(__name__).warning("no_spans", reason=redact(str(error)))
        return None
