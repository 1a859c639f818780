"""The only types that cross a process boundary: frozen, small, versioned; never tensors."""

from __future__ import annotations

import msgspec

from merging.plan.plan import ShardWork
from merging.receipts import Receipt


class ShardTask(msgspec.Struct, frozen=True):
    """One shard of one job to be done by any worker.

    Attributes:
        job_id: Whose it is.
        attempt: Which try at this shard, from 1.
        work: What to do.
        storage_roots: Prefixes that may be read and written; empty allows everything (CLI).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        traceparent: Span that the shard belongs to; told in the worker's log.
        otlp_endpoint: Collector that the worker sends its own spans to; None: it makes none.
    """

    job_id: str
    attempt: int
    work: ShardWork
    storage_roots: tuple[str, ...] = ()
    device: str = "auto"
    traceparent: str | None = None
    otlp_endpoint: str | None = None

    @property
    def key(self) -> tuple[str, int]:
        """Job and shard index: at most one such task is in flight in a pool."""
        return (self.job_id, self.work.shard.index)


class ShardProgress(msgspec.Struct, frozen=True, tag=True):
    """How far a shard is. Problems go through the stages in file order, so counts say which."""

    job_id: str
    shard_index: int
    attempt: int
    tensors_fetched: int
    tensors_solved: int
    tensors_written: int
    bytes_read: int
    bytes_written: int
    worker: str = ""


class ShardStarted(msgspec.Struct, frozen=True, tag=True):
    """A worker has taken up a shard."""

    job_id: str
    shard_index: int
    attempt: int
    worker: str
    device: str


class ShardLog(msgspec.Struct, frozen=True, tag=True):
    """Something that a worker has to say to people, without secrets; a few kilobytes at most."""

    job_id: str
    shard_index: int
    attempt: int
    worker: str
    text: str


class StorageTimes(msgspec.Struct, frozen=True, array_like=True):
    """How long requests of one kind took (:mod:`merging.storage.timed`)."""

    backend: str
    operation: str
    outcome: str
    seconds: tuple[float, ...]


class ShardDone(msgspec.Struct, frozen=True, tag=True):
    """A shard is published."""

    job_id: str
    shard_index: int
    attempt: int
    receipt: Receipt
    storage: tuple[StorageTimes, ...] = ()


class ShardFailed(msgspec.Struct, frozen=True, tag=True):
    """A shard failed; ``error`` is :meth:`merging.errors.MergeError.to_dict`."""

    job_id: str
    shard_index: int
    attempt: int
    error: dict[str, object]
    storage: tuple[StorageTimes, ...] = ()


PoolEvent = ShardStarted | ShardProgress | ShardLog | ShardDone | ShardFailed
