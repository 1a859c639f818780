"""Layers that would keep one worker busy after all others are done: divided over several.

The time of a merge is at least that of its longest problem. One that takes longer than a worker's
share of the whole is divided if its method can: a shard sums up its problem, as many as are of use
solve rows of it, and the output's shard puts them together. Its matrices then travel through the
workspace, A once for each worker. Whether that pays is decided here by counted operations, in which
a byte counts as what a worker computes meanwhile; real rates differ from machine to machine and are
no part of a plan. Blocks of rows are multiples of 64 (of the planned block, where memory asks for
one), and results have the bits of the undivided layer in these blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from merging.dtypes import ITEM_SIZE
from merging.method import JOIN, ROWS, SUMS, Divided
from merging.plan.cost import ROW_MULTIPLE
from merging.plan.intermediate import Intermediates, is_double, part_of, problem_geometry
from merging.plan.packing import data_bytes
from merging.plan.plan import Problem, Source

_FLOPS_PER_BYTE = 300.0
"""Of one CPU core (10¹¹ a second) while a byte is read or written (3·10⁸ a second)."""

_DEVICE_FLOPS_PER_BYTE = 30_000.0
"""Of a GPU (3·10¹³ a second in float32) at 10⁹ bytes a second."""

_WORTH_IT = 0.9
"""Dividing has to save a tenth: it costs files and waiting."""

_ITEM = ITEM_SIZE["F32"]


@dataclass(frozen=True, slots=True)
class _Division:
    """One way to divide a problem: rows per block, and the work of its parts and all together."""

    block: int
    longest: float
    total: float


def divide_large(
    problems: Sequence[Problem], stages: Intermediates, workers: int, warnings: list[str]
) -> list[Problem]:
    """The problems of the output, with those divided that would hold up the merge.

    Args:
        problems: All of them.
        stages: To which the shards of divided problems are added.
        workers: How many there will be.
        warnings: What was divided is added.
    """
    finals = list(problems)
    if workers == 1:
        return finals
    rate = _FLOPS_PER_BYTE if stages.budgets.device is None else _DEVICE_FLOPS_PER_BYTE
    work = [_work(problem, rate) for problem in problems]
    share = sum(work) / workers
    chosen: dict[int, tuple[Divided, _Division]] = {}
    for place, problem in enumerate(problems):
        divided = _divided(problem, stages)
        if divided is None or work[place] <= share:
            continue
        divisions = _divisions(problem, divided, stages, workers, rate)
        bounds = [max(d.longest, share + (d.total - work[place]) / workers) for d in divisions]
        if min(bounds) < _WORTH_IT * work[place]:
            chosen[place] = divided, divisions[bounds.index(min(bounds))]
    sums = {
        place: stages.of_step(_sums(problems[place], divided), SUMS)
        for place, (divided, _) in chosen.items()
    }
    summed = dict(zip(sums, stages.write_apart(list(sums.values()), SUMS), strict=True))
    blocks = {
        place: list(_rows(problems[place], divided, division.block, summed[place], stages))
        for place, (divided, division) in chosen.items()
    }
    solved = iter(stages.write_apart(list(itertools.chain(*blocks.values())), ROWS))
    for place, rows in blocks.items():
        finals[place] = _join(problems[place], [next(solved) for _ in rows], stages)
        warnings.append(
            f"{problems[place].tensor_name} would keep one worker busy longer than its share of"
            f" the merge: it is divided over {len(rows)} workers, in blocks of"
            f" {chosen[place][1].block} rows."
        )
    return finals


def _work(problem: Problem, rate: float) -> float:
    return problem.flops + rate * (problem.bytes_read + data_bytes(problem))


def _divided(problem: Problem, stages: Intermediates) -> Divided | None:
    """How a problem may be divided, if it may."""
    method = stages.method(problem)
    if method is None or method.divided is None or is_double(problem):
        return None
    is_in_form = method.divided.applies(problem_geometry(problem), stages.parameters(problem))
    return method.divided if is_in_form else None


def _divisions(
    problem: Problem, divided: Divided, stages: Intermediates, workers: int, rate: float
) -> list[_Division]:
    """All that are different, of those whose parts fit into memory; the problem as it is first."""
    whole = _work(problem, rate)
    rows, columns = problem_geometry(problem).matrix
    found = [_Division(rows, whole, whole)]
    sums = stages.of_step(_sums(problem, divided), SUMS)
    unit = problem.row_block or ROW_MULTIPLE
    for block in dict.fromkeys(-(-rows // (n * unit)) * unit for n in range(2, workers + 1)):
        count = -(-rows // block)
        nowhere = Source(0, 0, sums.num_entries * _ITEM, "F32")
        first = next(_rows(problem, divided, block, nowhere, stages))
        end = Source(0, 0, (block * columns + divided.num_rows) * _ITEM, "F32")
        join = _join(problem, [end] * count, stages)
        if all(stages.budgets.hold(part) for part in (sums, first, join)):
            before, solving, after = (_work(part, rate) for part in (sums, first, join))
            found.append(
                _Division(block, before + solving + after, before + count * solving + after)
            )
    return found


def _sums(problem: Problem, divided: Divided) -> Problem:
    """A, B and ΣT of a layer."""
    rows, columns = problem_geometry(problem).matrix
    entries = columns * columns + 2 * rows * columns + divided.num_sums
    return msgspec.structs.replace(
        problem, shape=(entries,), source_shape=problem.shape, dtype="F32"
    )


def _rows(
    problem: Problem, divided: Divided, block: int, sums: Source, stages: Intermediates
) -> Iterator[Problem]:
    """The update of each block of rows."""
    rows, columns = problem_geometry(problem).matrix
    right = columns * columns
    total = right + rows * columns
    end = total + rows * columns
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        of_rows = slice(start * columns, stop * columns)
        sources = (
            part_of(sums, slice(right)),
            part_of(sums, slice(right + of_rows.start, right + of_rows.stop)),
            part_of(sums, slice(total + of_rows.start, total + of_rows.stop)),
            part_of(sums, slice(end, None)),
        )
        some = msgspec.structs.replace(
            problem,
            shape=((stop - start) * columns + divided.num_rows,),
            source_shape=(stop - start, columns),
            dtype="F32",
            base=None,
            experts=sources,
            parts=(),
            transposed=False,
        )
        solved = stages.of_step(some, ROWS)
        yield msgspec.structs.replace(solved, row_block=problem.row_block or block)


def _join(problem: Problem, solved: Sequence[Source], stages: Intermediates) -> Problem:
    """The merged tensor."""
    joined = msgspec.structs.replace(problem, experts=tuple(solved), parts=())
    return stages.of_step(joined, JOIN)
