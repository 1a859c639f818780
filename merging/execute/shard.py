"""One shard from its plan to a published file: fetch → solve → encode → write, overlapping.

In a sweep there is a file for each variant: inputs are fetched once, and what variants have in
common is solved once.

This is the function that every worker runs, on a laptop and on a cluster. Its memory is bounded by
the plan's budget and its largest single problem; it reads only the bytes of its own problems; the
file appears whole, followed by its receipt, or not at all.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from merging.errors import PlanError
from merging.execute.fetch import Fetcher, Unit
from merging.execute.given import Given, read_given
from merging.execute.memory import BufferPool, MemoryBudget, give_back_freed_memory
from merging.execute.output import ShardFiles
from merging.execute.pieces import Group, Piece, cut_problems, group_pieces
from merging.execute.shard_run import ShardCounts, ShardRun, StageNote
from merging.execute.solve import Solver
from merging.plan.packing import data_bytes, shard_header
from merging.plan.plan import ALIGN, PLAN_FORMAT, STATISTICS, ShardWork
from merging.rates import Rates
from merging.receipts import OtherFile, ProblemFigures, Receipt, write_receipt
from merging.storage.base import Storage

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class _Solved:
    """What is known of a problem in one variant; shared work counts for the first that has it."""

    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def run_shard(
    work: ShardWork,
    storage: Storage,
    *,
    device: str = "cpu",
    on_progress: Callable[[ShardCounts], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    rates: Rates | None = None,
    on_stage: StageNote | None = None,
) -> Receipt:
    """Produce and publish one shard.

    Args:
        work: The plan of this shard.
        storage: Where sources are and the output goes.
        device: Torch device that solves.
        on_progress: Called after every piece.
        cancelled: Asked before every piece, and before each variant of it.
        rates: What is known of this machine's speed; goes into the receipt.
        on_stage: Told how the solving thread spends its time: ``fetch``, ``solve``, ``write``.

    Returns:
        The receipt, which is already stored beside the output.

    Raises:
        Cancelled: ``cancelled`` said so; nothing is left behind.
        StorageError: Reading or writing failed, or a source changed since planning.
        NumericalError: A tensor holds values that are not finite, or a solver failed.
        PlanError: The plan was made by an incompatible version, or for workers with a GPU.
    """
    import torch

    if work.format != PLAN_FORMAT:
        raise PlanError(
            f"This worker understands plan format {PLAN_FORMAT}, the plan has {work.format}."
            " Run the same version of Mergeyard everywhere.",
            code="wrong_version",
        )
    kind = work.settings[0].method
    if device == "cpu" and kind not in (STATISTICS, ALIGN):
        _check_host_memory(work)
    give_back_freed_memory()
    threads = torch.get_num_threads()
    torch.set_num_threads(work.threads)
    used = "cpu" if kind == ALIGN else device
    run = ShardRun(work, storage, used, on_progress, cancelled, rates, on_stage)
    try:
        if kind == ALIGN:
            from merging.execute.alignment import run_alignment

            return run_alignment(run)
        if kind == STATISTICS:
            from merging.execute.statistics import run_statistics

            return run_statistics(run)
        return _Merge(run).run()
    finally:
        torch.set_num_threads(threads)


def _check_host_memory(work: ShardWork) -> None:
    """Refuse what only fits a device: a plan for workers with a GPU counts on its memory."""
    for piece in cut_problems(work):
        needed = piece.problem.device_bytes + piece.output_bytes
        if needed > work.memory_budget:
            raise PlanError(
                f"Tensor {piece.problem.tensor_name!r} needs {needed} bytes of host memory when a"
                f" CPU solves it; the memory budget is {work.memory_budget} bytes. The plan is for"
                " workers with a GPU (device_memory_budget): run it on such, or plan without.",
                code="does_not_fit",
                context={"tensor_name": piece.problem.tensor_name, "needed_bytes": needed},
            )


class _Merge:
    """The run of a shard whose tensors a method makes."""

    def __init__(self, run: ShardRun) -> None:
        work = run.work
        self._run = run
        self._work = work
        self._storage = run.storage
        self._device = run.device
        self._groups = list(group_pieces(list(cut_problems(work)), work.memory_budget))
        self._given = Given()
        self._sums: dict[int, torch.Tensor] = {}
        self._budget = MemoryBudget(work.memory_budget)
        self._buffers = BufferPool(self._budget, pinned=run.device != "cpu")
        self._solver = Solver(work, run.device, self._buffers)
        self._variants = [
            [_Solved() for _ in range(work.shard.num_files)] for _ in work.shard.problems
        ]
        self._header = shard_header(work.shard.problems)
        ends = itertools.accumulate(map(data_bytes, work.shard.problems))
        self._ends = [len(self._header) + end for end in ends]
        self._fetched = 0
        self._solved = 0

    def run(self) -> Receipt:
        work, run = self._work, self._run
        with run.timed("fetch"):
            self._given = read_given(work, self._storage)
        self._solver.given = self._given.tensors
        with (
            ShardFiles(self._storage, work.file_uris, work.shard.size, self._budget) as files,
            self._fetcher(files.buffer_bytes) as fetcher,
        ):
            files.write(self._header)
            for group, units in zip(self._groups, fetcher.units, strict=True):
                self._run_group(group, units, fetcher, files)
            with run.timed("write"):
                (stat, sha256), *others = files.finish()
            run.bytes_read = self._given.bytes_read + fetcher.bytes_read
            run.read_requests = self._given.requests + fetcher.requests
            receipt = msgspec.structs.replace(
                run.receipt(stat, sha256, self._problem_figures(0), self._budget.peak),
                busy_seconds={"read": fetcher.busy.seconds, "write": files.busy.seconds},
                others=tuple(
                    OtherFile(stat.size, sha256, stat.version, self._problem_figures(number))
                    for number, (stat, sha256) in enumerate(others, 1)
                ),
            )
            self._report(fetcher, files)
        write_receipt(self._storage, work.output_uri, receipt)
        return receipt

    def _fetcher(self, writer_bytes: int) -> Fetcher:
        """Start reading ahead, into what the budget leaves beside solving and writing."""
        pieces = (piece for group in self._groups for piece in group.pieces)
        self._budget.set_aside(max(map(self._working_bytes, pieces), default=0) + writer_bytes)
        return Fetcher(self._work, self._groups, self._storage, self._budget, self._buffers)

    def _working_bytes(self, piece: Piece) -> int:
        """Host memory that solving a piece takes beside its inputs."""
        workspace = piece.workspace_bytes if self._device == "cpu" else 0
        return workspace + piece.output_bytes

    def _run_group(
        self, group: Group, units: list[Unit], fetcher: Fetcher, files: ShardFiles
    ) -> None:
        held = dict.fromkeys(units)

        def release(unit: Unit) -> None:
            del held[unit]
            fetcher.release(unit)

        for piece in group.pieces:
            alone = len(group.pieces) == 1
            inputs = self._inputs(piece, units, fetcher, release if alone else None)
            self._run_piece(piece, units, inputs, files)
            if piece.is_last:
                self._solved = piece.number + 1
            self._report(fetcher, files)
        for unit in list(held):
            release(fetcher.wait(unit))

    def _run_piece(
        self, piece: Piece, units: list[Unit], inputs: Iterator[torch.Tensor], files: ShardFiles
    ) -> None:
        """Solve a piece in all variants; each result is written while the next is solved."""
        variants = self._variants[piece.number]
        results = self._solver.solve(piece, inputs, [variant.figures for variant in variants])
        working = self._working_bytes(piece)
        with contextlib.closing(results):
            for _ in range(len(piece.treatment.applied)):
                self._run.check_cancelled()
                with self._run.timed("write"):
                    self._wait_for_writes(files, piece, units)
                self._budget.take(working)
                self._buffers.make_room()
                before = self._run.seconds["solve"]
                with self._run.timed("solve"):
                    numbers, result, done = next(results)
                self._budget.release(working)
                variants[numbers[0]].seconds += self._run.seconds["solve"] - before
                if piece.treatment.is_sum:
                    result = self._add_up(piece, numbers[0], result)
                if piece.is_last or not piece.is_partial:
                    with self._run.timed("write"):
                        files.write(result, numbers, done)
                del result, done

    def _add_up(self, piece: Piece, number: int, result: torch.Tensor) -> torch.Tensor:
        """The sum of the results of a problem's pieces so far, in one of the files."""
        if piece.start > 0:
            result = self._sums.pop(number).add_(result)
        if not piece.is_last:
            self._sums[number] = result
        return result

    def _wait_for_writes(self, files: ShardFiles, piece: Piece, units: list[Unit]) -> None:
        """Let earlier results be written first if they are in the way of solving the next.

        Inputs that are still to be read will be, whatever is held by then: they count already.
        """
        budget, working = self._budget, self._working_bytes(piece)

        def has_room() -> bool:
            coming = sum(unit.num_bytes for unit in units if not unit.admitted.is_set())
            if piece.streaming:
                coming = min(coming, piece.resident_bytes)
            return budget.used + coming + working <= budget.limit

        budget.wait_until(lambda: has_room() or not files.bytes_waiting)

    def _inputs(
        self,
        piece: Piece,
        units: list[Unit],
        fetcher: Fetcher,
        release: Callable[[Unit], None] | None,
    ) -> Iterator[torch.Tensor]:
        """The piece's inputs, base first, as they arrive.

        With ``release``, an expert of a streaming method is let go when the next is asked for;
        all others stay until the group is done, since the method may still look at them.
        """
        has_base = piece.problem.base is not None
        last = len(piece.sources) - 1
        for position in range(last + 1):
            unit = units[position]
            with self._run.timed("fetch"):
                fetcher.wait(unit)
            if position == last and piece.is_last:
                self._fetched = piece.number + 1
            yield unit.view(piece)
            if release is not None and piece.streaming and not (has_base and position == 0):
                release(unit)

    def _report(self, fetcher: Fetcher, files: ShardFiles) -> None:
        if self._run.on_progress is None:
            return
        written = files.bytes_written
        self._run.on_progress(
            ShardCounts(
                tensors_fetched=self._fetched,
                tensors_solved=self._solved,
                tensors_written=bisect.bisect_right(self._ends, min(written)),
                bytes_read=fetcher.bytes_read,
                bytes_written=sum(written),
            )
        )

    def _problem_figures(self, number: int) -> tuple[ProblemFigures, ...]:
        """Figures of all problems in one of the files."""
        return tuple(
            ProblemFigures(
                tensor_name=problem.tensor_name,
                method=self._work.settings[problem.setting].of_variant(number).method,
                solve_seconds=round(variants[number].seconds, 6),
                figures=variants[number].figures,
            )
            for problem, variants in zip(self._work.shard.problems, self._variants, strict=True)
        )
