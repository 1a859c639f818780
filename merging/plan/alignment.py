"""Embeddings and heads with their rows in the order of the output's tokens, before they are merged.

Models whose vocabularies differ have tensors of different heights. Each is put in order by a stage
before the merge: a file in the workspace, made from the rows that it needs, which are all that is
read. After that every method and parameter means what it means elsewhere. A model whose rows stand
in that order already is read where it lies.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import math
from collections.abc import Sequence

import msgspec

from merging.checkpoint.index import CheckpointIndex, TensorEntry
from merging.dtypes import ITEM_SIZE
from merging.errors import Fault, RecipeError
from merging.method import MergeMethod
from merging.plan.cost import ROW_MULTIPLE, Budgets
from merging.plan.inputs import Inputs
from merging.plan.intermediate import Intermediates
from merging.plan.plan import ALIGN, Problem, Setting, Source
from merging.plan.problems import ProblemBuilder, promote
from merging.plan.vocabulary import RowTable, Run, Vocabulary
from merging.plan.wording import shorten_list
from merging.sampled import FISHER

_WORKING_BYTES = 8
"""Of an entry while it is worked on: a float32 or float64 number."""


class AlignmentWork(msgspec.Struct, frozen=True):
    """What makes a tensor: in the plan, the parameters of its setting.

    Attributes:
        runs: Its rows in order; parts are numbers of the problem's sources and rows in them.
        padding: Rows after these, each the mean of all of them.
    """

    runs: tuple[Run, ...]
    padding: int = 0


def with_output_rows(inputs: Inputs, vocabulary: Vocabulary) -> Inputs:
    """The inputs with vocabulary tensors of the output's shape, as they are merged."""
    resized: dict[int, CheckpointIndex] = {}

    def resize(index: CheckpointIndex) -> CheckpointIndex:
        if id(index) not in resized:
            tensors = dict(index.tensors)
            for name in vocabulary.tensors_of(index):
                shape = (vocabulary.num_rows, *tensors[name].shape[1:])
                tensors[name] = dataclasses.replace(tensors[name], shape=shape)
            resized[id(index)] = dataclasses.replace(index, tensors=tensors)
        return resized[id(index)]

    def change(one: Inputs) -> Inputs:
        return dataclasses.replace(
            one,
            base=one.base and resize(one.base),
            experts=tuple(dataclasses.replace(e, index=resize(e.index)) for e in one.experts),
            slices=tuple(map(change, one.slices)),
            slice_bases=tuple(map(resize, one.slice_bases)),
        )

    return change(inputs)


def align(
    inputs: Inputs,
    vocabulary: Vocabulary,
    builder: ProblemBuilder,
    stages: Intermediates,
    warnings: list[str],
) -> dict[tuple[str, str], Source]:
    """Where the vocabulary tensors of all models are read; stages are added that make them.

    Args:
        inputs: The checkpoints as they are stored.
        vocabulary: The output's.
        builder: Knows the plan's files and settings.
        stages: To which those that put rows in order are added.
        warnings: Tokens without an embedding are told here.

    Returns:
        Sources by address of the model and the tensor's name in it.

    Raises:
        RecipeError: ``incompatible_options``: a token that is to be taken from a model that lacks
            it, an adapter that changes rows that have to be moved, or a method that runs merged
            embeddings on an expert's tokens, or measures each of its rows.
    """
    _check_method(inputs.method)
    alignment = _Alignment(vocabulary, builder, stages, warnings)
    for section in inputs.sections:
        alignment.add(section)
    return alignment.finish()


def _check_method(method: MergeMethod) -> None:
    if method.sequential or FISHER in method.calibrated:
        detail = (
            f"{method.name} needs models of one vocabulary: its samples are in the tokens of each"
            " expert, and it looks at merged embeddings or at single rows."
        )
        fault = Fault("/merge_method", "incompatible_options", detail)
        raise RecipeError(detail, code="incompatible_options", faults=[fault])


class _Alignment:
    """One call of :func:`align`."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        builder: ProblemBuilder,
        stages: Intermediates,
        warnings: list[str],
    ) -> None:
        self._vocabulary = vocabulary
        self._builder = builder
        self._stages = stages
        self._warnings = warnings
        self._found: dict[tuple[str, str], Source] = {}
        self._moved: dict[str, list[Problem]] = {}
        self._tables: dict[tuple[tuple[str, ...], tuple[int, ...]], RowTable] = {}
        self._settings: dict[str, int] = {}

    def add(self, section: Inputs) -> None:
        """Put the tensors of a section's models in order."""
        indexes = {expert.index.uri: expert.index for expert in section.experts}
        if section.base is not None:
            indexes.setdefault(section.base.uri, section.base)
        names = {uri: self._vocabulary.tensors_of(index) for uri, index in indexes.items()}
        for name in dict.fromkeys(name for own in names.values() for name in own):
            having = [index for uri, index in indexes.items() if name in names[uri]]
            table = self._table(section, having, name)
            for place in range(len(having)):
                self._add_tensor(name, place, having, table)
            self._check_adapters(section, name)

    def finish(self) -> dict[tuple[str, str], Source]:
        """Add the stages; where everything is read."""
        for number, (uri, problems) in enumerate(self._moved.items(), 1):
            sources = self._stages.write(problems, f"vocabulary-{number:02d}")
            for problem, source in zip(problems, sources, strict=True):
                self._found[uri, problem.tensor_name] = source
        return self._found

    def _table(self, section: Inputs, indexes: Sequence[CheckpointIndex], name: str) -> RowTable:
        models = tuple(index.uri for index in indexes)
        heights = tuple(index.tensors[name].shape[0] for index in indexes)
        key = (models, heights)
        if key not in self._tables:
            base = section.base.uri if section.base is not None else None
            self._tables[key] = RowTable(self._vocabulary, models, base, heights)
            if missing := self._tables[key].missing():
                self._warnings.append(
                    f"{len(missing)} tokens of the output are in none of {shorten_list(models)};"
                    f" their embeddings are zeros: {shorten_list([*map(repr, missing)])}."
                )
        return self._tables[key]

    def _add_tensor(
        self, name: str, place: int, indexes: Sequence[CheckpointIndex], table: RowTable
    ) -> None:
        index = indexes[place]
        key = (index.uri, index.tensors[name].name)
        runs = table.runs(place)
        padding = self._vocabulary.num_rows - self._vocabulary.num_tokens
        sources, moved = _ranges(runs, [i.tensors[name] for i in indexes])
        found = [self._builder.source(indexes[model], entry, "") for model, entry in sources]
        if len(runs) == 1 and len(runs[0].parts) == 1 and not padding:
            self._found[key] = found[0]
            return
        work = AlignmentWork(tuple(moved), padding)
        is_mean = padding > 0 or any(len(run.parts) > 1 for run in runs)
        dtypes = [entry.dtype for _, entry in sources] + ["F32"] * is_mean
        problem = Problem(
            tensor_name=key[1],
            shape=(self._vocabulary.num_rows, *index.tensors[name].shape[1:]),
            dtype=promote(dtypes),
            setting=self._setting(work),
            base=None,
            experts=tuple(found),
            role="embedding",
        )
        self._moved.setdefault(index.uri, []).append(
            _with_cost(problem, work, self._stages.budgets)
        )

    def _setting(self, work: AlignmentWork) -> int:
        """The setting of this work; head and embedding share one."""
        data = msgspec.json.encode(work)
        key = hashlib.sha256(data).hexdigest()
        if key not in self._settings:
            setting = Setting(ALIGN, msgspec.json.decode(data))
            self._settings[key] = self._builder.settings.add(setting)
        return self._settings[key]

    def _check_adapters(self, section: Inputs, name: str) -> None:
        """Refuse adapters of rows that are moved: their factors would have to be moved too."""
        for expert in section.experts:
            entry = expert.index.tensors.get(name)
            if entry is None or name not in expert.adapted:
                continue
            source = self._found.get((expert.index.uri, entry.name))
            if source is None or (source.start, source.end) != (entry.start, entry.end):
                detail = (
                    f"The adapter of {expert.pointer} changes {entry.name}, whose rows have another"
                    " order in the merged vocabulary. Merge it into its model first"
                    " (merge_and_unload of peft), and name the result."
                )
                fault = Fault(expert.pointer, "adapter_unsupported", detail)
                raise RecipeError(detail, code="incompatible_options", faults=[fault])


def _ranges(
    runs: Sequence[Run], entries: Sequence[TensorEntry]
) -> tuple[list[tuple[int, TensorEntry]], list[Run]]:
    """The ranges of rows that are needed, as tensors, and the runs with parts in these.

    Args:
        runs: Parts are numbers of models and rows.
        entries: The models' tensors.

    Returns:
        Models with the ranges, each row in one of them; and the runs.
    """
    bounds: dict[int, list[tuple[int, int]]] = {}
    for run in runs:
        for model, first in run.parts:
            bounds.setdefault(model, []).append((first, first + run.count))
    ranges: list[tuple[int, TensorEntry]] = []
    starts: dict[int, list[int]] = {}
    numbers: dict[int, int] = {}
    for model, pairs in bounds.items():
        joined = join_ranges(pairs)
        numbers[model] = len(ranges)
        starts[model] = [start for start, _ in joined]
        ranges += [(model, _rows_of(entries[model], start, end)) for start, end in joined]

    def move(model: int, row: int) -> tuple[int, int]:
        place = bisect.bisect_right(starts[model], row) - 1
        return numbers[model] + place, row - starts[model][place]

    moved = [Run(run.count, tuple(move(*part) for part in run.parts)) for run in runs]
    return ranges, moved


def join_ranges(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Intervals that overlap or touch, as one."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(pairs):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _rows_of(entry: TensorEntry, start: int, end: int) -> TensorEntry:
    """Some rows of a tensor."""
    row_bytes = (entry.end - entry.start) // max(entry.shape[0], 1)
    return dataclasses.replace(
        entry,
        shape=(end - start, *entry.shape[1:]),
        start=entry.start + start * row_bytes,
        end=entry.start + end * row_bytes,
    )


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
