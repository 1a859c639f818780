"""Fetching: coalesced ranged reads, several in flight, bounded by the memory budget.

The unit of fetching is one source (base, or one expert) of one group of pieces. Units are admitted
strictly in the order in which the solver needs them; inside a unit neighbouring ranges of a file
are read as one, and long ranges in parts that are in flight together. Every byte of the plan is
read exactly once, and none beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from merging.dtypes import torch_dtype
from merging.errors import Cancelled, MergeError
from merging.execute.busy import BusyClock
from merging.execute.memory import BufferPool, MemoryBudget
from merging.execute.pieces import Group, Piece
from merging.plan.plan import ShardWork, Source
from merging.storage.base import Storage

if TYPE_CHECKING:
    import torch

READ_PART_BYTES = 16 << 20
"""Longest single read; longer ranges are split and their parts read at the same time."""

READ_THREADS = 8


class _Range:
    """One coalesced read: bytes ``[start, end)`` of a file, and the buffer that they go to."""

    __slots__ = ("buffer", "end", "file", "start")

    def __init__(self, source: Source) -> None:
        self.file = source.file
        self.start = source.start
        self.end = source.end
        self.buffer: torch.Tensor | None = None


def coalesce(sources: Sequence[Source]) -> list[_Range]:
    """Join ranges of one file that touch; sorted by file and offset.

    What several problems read is read for each of them, as the plan counts it.
    """
    ranges: list[_Range] = []
    for source in sorted(sources, key=lambda source: (source.file, source.start)):
        if source.start == source.end:
            continue
        last = ranges[-1] if ranges else None
        if last is not None and last.file == source.file and source.start == last.end:
            last.end = source.end
        else:
            ranges.append(_Range(source))
    return ranges


class Unit:
    """One source of one group, on its way or in memory."""

    def __init__(self, group: Group, position: int) -> None:
        self._position = position
        self.ranges = coalesce(
            [p.sources[position] for p in group.pieces if position < len(p.sources)]
        )
        self.num_bytes = sum(r.end - r.start for r in self.ranges)
        self.urgent = threading.Event()
        self.admitted = threading.Event()
        self.reads: list[Future[None]] = []
        self.error: MergeError | None = None
        self.is_ahead = True

    def view(self, piece: Piece) -> torch.Tensor:
        """The piece's entries as a flat tensor in their stored dtype, without copying.

        Only a tensor that does not lie at a multiple of its entry size is copied.
        """
        import torch

        source = piece.sources[self._position]
        dtype = torch_dtype(source.dtype)
        if source.start == source.end:
            return torch.empty(0, dtype=dtype)
        for r in self.ranges:
            if r.file == source.file and r.start <= source.start and source.end <= r.end:
                assert r.buffer is not None
                data = r.buffer[source.start - r.start : source.end - r.start]
                if data.storage_offset() % dtype.itemsize:
                    data = data.clone()
                return data.view(dtype)
        raise AssertionError("a unit covers all its sources")


class Fetcher:
    """Reads the units of a shard ahead of the solver.

    Use as a context manager; iterate the groups with :attr:`units` and call :meth:`wait` and
    :meth:`release` for each unit, in order.
    """

    def __init__(
        self,
        work: ShardWork,
        groups: Sequence[Group],
        storage: Storage,
        budget: MemoryBudget,
        buffers: BufferPool,
    ) -> None:
        self.units = [
            [Unit(group, position) for position in range(group.num_sources)] for group in groups
        ]
        self.bytes_read = 0
        self.requests = 0
        self.busy = BusyClock()
        self._files = work.files
        self._storage = storage
        self._budget = budget
        self._buffers = buffers
        self._lock = threading.Lock()
        budget.allow_ahead(
            max((sum(u.num_bytes for u in units) for units in self.units), default=0)
        )
        self._threads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="fetch")
        self._dispatcher = threading.Thread(target=self._dispatch, name="fetch-order", daemon=True)
        self._dispatcher.start()

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.close()
        self._dispatcher.join()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def wait(self, unit: Unit) -> Unit:
        """Block until the unit is in memory; raises what its reads raised."""
        unit.urgent.set()
        self._budget.wake()
        unit.admitted.wait()
        if unit.error is not None:
            raise unit.error
        if unit.is_ahead:
            unit.is_ahead = False
            self._budget.arrive(unit.num_bytes)
        for read in unit.reads:
            read.result()
        return unit

    def release(self, unit: Unit) -> None:
        """The solver is done with the unit: its memory may be used again."""
        for r in unit.ranges:
            if r.buffer is not None:
                self._buffers.put(r.buffer)
                r.buffer = None
        self._budget.release(unit.num_bytes)

    def _dispatch(self) -> None:
        for units in self.units:
            for unit in units:
                if not self._budget.wait_and_take(unit.num_bytes, urgent=unit.urgent):
                    unit.error = Cancelled("The shard was stopped.")
                else:
                    try:
                        self._submit(unit)
                    except (MemoryError, RuntimeError) as error:
                        unit.error = MergeError(
                            f"No host memory for {unit.num_bytes} bytes of input: {error}",
                            code="out_of_memory",
                        )
                unit.admitted.set()

    def _submit(self, unit: Unit) -> None:
        for r in unit.ranges:
            r.buffer = self._buffers.get(r.end - r.start)
            host = r.buffer.numpy().data
            for start in range(r.start, r.end, READ_PART_BYTES):
                end = min(start + READ_PART_BYTES, r.end)
                target = host[start - r.start : end - r.start]
                unit.reads.append(self._threads.submit(self._read, r.file, start, target))

    def _read(self, file: int, start: int, target: memoryview) -> None:
        source = self._files[file]
        with self.busy:
            self._storage.read_into(source.uri, start, target, version=source.version)
        with self._lock:
            self.bytes_read += len(target)
            self.requests += 1
