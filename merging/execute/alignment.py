"""Putting the rows of embeddings and heads in the order of the output's tokens.

Blocks of rows, as the plan cuts them, one after the other: while one is read and put together, the
one before it is written. Only rows that a block needs are read, neighbours together.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import torch

from merging.dtypes import torch_dtype
from merging.execute.fetch import READ_PART_BYTES, READ_THREADS
from merging.execute.memory import MemoryBudget
from merging.execute.output import ShardFiles
from merging.execute.shard_run import ShardRun
from merging.execute.solve import check_finite
from merging.plan.moving import AlignmentWork
from merging.plan.packing import shard_header
from merging.plan.plan import ALIGN, Problem
from merging.plan.row_ranges import join_ranges
from merging.plan.vocabulary import Run
from merging.receipts import ProblemFigures, Receipt, write_receipt


def run_alignment(run: ShardRun) -> Receipt:
    """Produce and publish one shard of aligned tensors; as in :mod:`merging.execute.shard`."""
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="rows") as threads:
        return _Alignment(run, threads).run()


class _Alignment:
    """The run of a shard of aligned tensors."""

    def __init__(self, run: ShardRun, threads: ThreadPoolExecutor) -> None:
        self._run = run
        self._work = run.work
        self._storage = run.storage
        self._threads = threads
        self._budget = MemoryBudget(run.work.memory_budget)

    def run(self) -> Receipt:
        """All tensors of the shard."""
        shard = self._work.shard
        figures = []
        with ShardFiles(self._storage, self._work.file_uris, shard.size, self._budget) as files:
            files.write(shard_header(shard.problems))
            for number, problem in enumerate(shard.problems):
                before = self._run.seconds["solve"]
                self._run_problem(problem, files, number)
                seconds = round(self._run.seconds["solve"] - before, 6)
                figures.append(ProblemFigures(problem.tensor_name, ALIGN, seconds))
            with self._run.timed("write"):
                [(stat, sha256)] = files.finish()
        receipt = self._run.receipt(stat, sha256, tuple(figures), self._budget.peak)
        write_receipt(self._storage, self._work.output_uri, receipt)
        return receipt

    def _run_problem(self, problem: Problem, files: ShardFiles, number: int) -> None:
        parameters = self._work.settings[problem.setting].parameters
        work = msgspec.convert(parameters, AlignmentWork)
        blocks = _Blocks(problem, work, self._read)
        for start in range(0, problem.shape[0], problem.row_block or problem.shape[0]):
            self._run.check_cancelled()
            end = min(start + (problem.row_block or problem.shape[0]), problem.shape[0])
            self._budget.take(block_bytes := problem.host_bytes // 2)
            with self._run.timed("solve"):
                block = blocks.make(start, end)
            with self._run.timed("write"):
                self._budget.wait_until(lambda: not files.bytes_waiting)
                files.write(block)
            self._budget.release(block_bytes)
            num_done = number + (end == problem.shape[0])
            self._run.tell(num_done, sum(files.bytes_written))

    def _read(self, problem: Problem, wanted: dict[int, list[tuple[int, int]]]) -> _Rows:
        """Rows of some of a problem's sources, each once."""
        rows = _Rows()
        waiting = []
        row_entries = problem.num_entries // max(problem.shape[0], 1)
        for number, ranges in wanted.items():
            source = problem.experts[number]
            dtype = torch_dtype(source.dtype)
            row_bytes = row_entries * dtype.itemsize
            file = self._work.files[source.file]
            for first, last in join_ranges(ranges):
                buffer = torch.empty((last - first) * row_bytes, dtype=torch.uint8)
                rows.add(number, first, buffer.view(dtype).view(last - first, row_entries))
                for part in range(0, len(buffer), READ_PART_BYTES):
                    target = buffer.numpy().data[part : part + READ_PART_BYTES]
                    offset = source.start + first * row_bytes + part
                    waiting.append(
                        self._threads.submit(
                            self._storage.read_into, file.uri, offset, target, version=file.version
                        )
                    )
                    self._run.bytes_read += len(target)
        self._run.read_requests += len(waiting)
        with self._run.timed("fetch"):
            for read in waiting:
                read.result()
        if self._work.check_finite:
            for number, buffer in rows.all():
                uri = self._work.files[problem.experts[number].file].uri
                what = f"Tensor {problem.experts[number].name or problem.tensor_name!r} in {uri}"
                check_finite(buffer.reshape(-1), what, "non_finite_input")
        return rows


class _Rows:
    """Rows of sources, in memory."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[list[int], list[torch.Tensor]]] = {}

    def add(self, number: int, first: int, rows: torch.Tensor) -> None:
        """Keep rows of a source, in ascending order."""
        starts, found = self._found.setdefault(number, ([], []))
        starts.append(first)
        found.append(rows)

    def all(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Numbers of sources, and rows of them."""
        for number, (_, found) in self._found.items():
            yield from ((number, rows) for rows in found)

    def get(self, number: int, first: int, count: int) -> torch.Tensor:
        """Consecutive rows of a source."""
        starts, found = self._found[number]
        place = bisect.bisect_right(starts, first) - 1
        return found[place][first - starts[place] :][:count]


class _Blocks:
    """Makes blocks of rows of one tensor, in order."""

    def __init__(
        self,
        problem: Problem,
        work: AlignmentWork,
        read: Callable[[Problem, dict[int, list[tuple[int, int]]]], _Rows],
    ) -> None:
        self._problem = problem
        self._read = read
        self._dtype = torch_dtype(problem.dtype)
        self._num_tokens = problem.shape[0] - work.padding
        self._runs = iter(work.runs)
        self._left = Run(0, ())
        self._sum: torch.Tensor | float = 0.0

    def make(self, start: int, end: int) -> torch.Tensor:
        """Rows ``[start, end)``, flat."""
        num_rows = max(0, min(end, self._num_tokens) - start)
        runs = list(self._take(num_rows))
        wanted: dict[int, list[tuple[int, int]]] = {}
        for run in runs:
            for source, first in run.parts:
                wanted.setdefault(source, []).append((first, first + run.count))
        rows = self._read(self._problem, wanted)
        width = self._problem.num_entries // self._problem.shape[0]
        block = torch.empty(end - start, width, dtype=self._dtype)
        place = 0
        for run in runs:
            _fill(block[place : place + run.count], run, rows)
            place += run.count
        if self._num_tokens < self._problem.shape[0]:
            self._sum += block[:num_rows].sum(0, dtype=torch.float64)
            block[num_rows:] = self._sum / self._num_tokens
        return block.view(-1)

    def _take(self, count: int) -> Iterator[Run]:
        """The next rows, as runs."""
        while count > 0:
            if self._left.count == 0:
                self._left = next(self._runs)
            run = self._left
            taken = min(run.count, count)
            yield Run(taken, run.parts)
            parts = tuple((source, first + taken) for source, first in run.parts)
            self._left = Run(run.count - taken, parts)
            count -= taken


def _fill(target: torch.Tensor, run: Run, rows: _Rows) -> None:
    """Set rows to what a run says: copies, means or zeros."""
    if not run.parts:
        target.zero_()
        return
    found = [rows.get(source, first, run.count) for source, first in run.parts]
    if len(found) == 1:
        target.copy_(found[0])
        return
    total = found[0].to(target.dtype, copy=True)
    for other in found[1:]:
        total += other
    target.copy_(total / len(found))
