"""Stages that make tensors out of rows of others: embeddings, heads, and what is known of these."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import msgspec

from merging.checkpoint.adapter import AdapterIndex
from merging.checkpoint.index import CheckpointIndex, TensorEntry
from merging.dtypes import ITEM_SIZE
from merging.plan.cost import ROW_MULTIPLE, Budgets
from merging.plan.intermediate import Intermediates
from merging.plan.plan import ALIGN, Problem, Setting, Source
from merging.plan.problems import ProblemBuilder, promote
from merging.plan.row_ranges import ranges_of
from merging.plan.vocabulary import Row, Run, Vocabulary, runs_of

_WORKING_BYTES = 8
"""Of an entry while it is worked on: a float32 or float64 number."""

Place = tuple[CheckpointIndex | AdapterIndex | None, TensorEntry]
"""A tensor, and whose files it lies in; None: a file of the plan, which is that number."""


class AlignmentWork(msgspec.Struct, frozen=True):
    """What makes a tensor: in the plan, the parameters of its setting.

    Attributes:
        runs: Its rows in order; parts are numbers of the problem's sources and rows in them.
        padding: Rows after these, each the mean of all of them.
    """

    runs: tuple[Run, ...]
    padding: int = 0


class RowMover:
    """Makes problems of moving rows.

    Args:
        builder: Knows the plan's files and settings.
        stages: Know the budgets.
    """

    def __init__(self, builder: ProblemBuilder, stages: Intermediates) -> None:
        self._builder = builder
        self._stages = stages
        self._settings: dict[str, int] = {}

    def move(
        self,
        name: str,
        shape: tuple[int, ...],
        runs: Sequence[Run],
        places: Mapping[int, Place],
        *,
        padding: int = 0,
    ) -> Problem | Source:
        """What makes a tensor out of rows of others; or where it lies, if these follow each other.

        Args:
            name: Of the tensor.
            shape: Of it.
            runs: Its rows before the padding.
            places: The tensors that the runs name, by number.
            padding: How many of its rows are the mean of all others.
        """
        sources, moved = ranges_of(runs, {n: entry for n, (_, entry) in places.items()})
        found = [self._source(places[number][0], entry) for number, entry in sources]
        if len(runs) == 1 and len(runs[0].parts) == 1 and not padding:
            return found[0]
        work = AlignmentWork(tuple(moved), padding)
        is_mean = padding > 0 or any(len(run.parts) > 1 for run in runs)
        dtypes = [entry.dtype for _, entry in sources] + ["F32"] * is_mean
        problem = Problem(
            tensor_name=name,
            shape=shape,
            dtype=promote(dtypes),
            setting=self._setting(work),
            base=None,
            experts=tuple(found),
            role="embedding",
        )
        return _with_cost(problem, work, self._stages.budgets)

    def _source(self, index: CheckpointIndex | AdapterIndex | None, entry: TensorEntry) -> Source:
        if index is not None:
            return self._builder.source(index, entry, "")
        return Source(entry.file, entry.start, entry.end, entry.dtype)

    def _setting(self, work: AlignmentWork) -> int:
        """The setting of this work; head and embedding share one."""
        data = msgspec.json.encode(work)
        key = hashlib.sha256(data).hexdigest()
        if key not in self._settings:
            setting = Setting(ALIGN, msgspec.json.decode(data))
            self._settings[key] = self._builder.settings.add(setting)
        return self._settings[key]


class Renumbering:
    """Puts single tensors in the order of the output's tokens, or back in that of a model's.

    Args:
        vocabulary: The output's.
        builder: Knows the plan's files and settings.
        stages: To which those that put rows in order are added.
    """

    def __init__(
        self, vocabulary: Vocabulary, builder: ProblemBuilder, stages: Intermediates
    ) -> None:
        self._vocabulary = vocabulary
        self._mover = RowMover(builder, stages)
        self._stages = stages
        self._count = 0

    def statistic(self, index: CheckpointIndex, name: str, found: Source) -> Source:
        """What is known of each row of a model's tensor, in the output's order.

        It is zero of rows that are not the model's own: of tokens that it lacks, or for which the
        recipe takes another row.
        """
        if name not in self._vocabulary.tensors_of(index):
            return found
        entry = index.tensors[name]
        rows: list[tuple[Row, ...]] = [()] * self._vocabulary.num_rows
        forced = {token for token, choice in self._vocabulary.choices.items() if choice.force}
        for token, number in self._vocabulary.numbers.items():
            row = self._vocabulary.models[index.uri].get(token, -1)
            if token not in forced and 0 <= row < entry.shape[0]:
                rows[number] = ((0, row),)
        known = TensorEntry(name, found.dtype, entry.shape, found.file, found.start, found.end)
        return self._write(name, rows, {0: (None, known)})

    def merged(self, index: CheckpointIndex, name: str, found: Source) -> Source:
        """A merged tensor, in the order of a model's tokens.

        Rows of tokens that the output does not have are the model's own.
        """
        if name not in self._vocabulary.tensors_of(index):
            return found
        entry = index.tensors[name]
        rows: list[tuple[Row, ...]] = [((1, row),) for row in range(entry.shape[0])]
        for number, row in enumerate(self._vocabulary.rows_of(index.uri, entry.shape[0])):
            if row >= 0:
                rows[row] = ((0, number),)
        shape = (self._vocabulary.num_rows, *entry.shape[1:])
        merged = TensorEntry(name, found.dtype, shape, found.file, found.start, found.end)
        return self._write(name, rows, {0: (None, merged), 1: (index, entry)})

    def _write(
        self, name: str, rows: Sequence[tuple[Row, ...]], places: Mapping[int, Place]
    ) -> Source:
        runs = runs_of(rows)
        used = {number for run in runs for number, _ in run.parts}
        shape = (len(rows), *places[0][1].shape[1:])
        chosen = {number: place for number, place in places.items() if number in used}
        moved = self._mover.move(name, shape, runs, chosen)
        if isinstance(moved, Source):
            return moved
        self._count += 1
        [source] = self._stages.write([moved], f"renumbered-{self._count:02d}")
        return source


def _with_cost(problem: Problem, work: AlignmentWork, budgets: Budgets) -> Problem:
    """The problem in the largest blocks of rows of which two fit: one made, one written."""
    num_rows = problem.shape[0]
    width = math.prod(problem.shape[1:])
    read = max(ITEM_SIZE[source.dtype] for source in problem.experts) * max(
        len(run.parts) for run in work.runs
    )
    per_row = width * (read + _WORKING_BYTES + ITEM_SIZE[problem.dtype])
    block = budgets.host // 2 // per_row // ROW_MULTIPLE * ROW_MULTIPLE
    block = max(block, ROW_MULTIPLE)
    return msgspec.structs.replace(
        problem,
        row_block=0 if block >= num_rows else block,
        host_bytes=2 * per_row * min(block, num_rows),
    )
