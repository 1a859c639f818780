"""Embeddings and heads with their rows in the order of the output's tokens, before they are merged.

Models whose vocabularies differ have tensors of different heights. Each is put in order by a stage
before the merge: a file in the workspace, made from the rows that it needs, which are all that is
read. After that every method and parameter means what it means elsewhere. A model whose rows stand
in that order already is read where it lies.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from merging.checkpoint.adapter import AdapterIndex
from merging.checkpoint.index import CheckpointIndex, TensorEntry
from merging.dtypes import ITEM_SIZE
from merging.errors import Fault, RecipeError
from merging.method import MergeMethod
from merging.plan.cost import ROW_MULTIPLE, Budgets
from merging.plan.expanding import adapted_tensor
from merging.plan.inputs import Expert, Inputs
from merging.plan.intermediate import Intermediates
from merging.plan.plan import ALIGN, Problem, Setting, Source
from merging.plan.problems import ProblemBuilder, promote
from merging.plan.row_ranges import ranges_of
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
            it, or a method that runs merged embeddings on an expert's tokens, or measures each of
            its rows.
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


_Place = tuple[CheckpointIndex | AdapterIndex | None, TensorEntry]
"""A tensor, and whose files it lies in; None is the plan's own."""


@dataclass(frozen=True, slots=True)
class _Model:
    """A model with rows: a checkpoint, or an expert whose adapter changes them."""

    index: CheckpointIndex
    adapted: Expert | None = None

    @property
    def address(self) -> str:
        return self.adapted.address if self.adapted else self.index.uri


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
        self._tables: dict[tuple[Any, ...], RowTable] = {}
        self._expanded: dict[tuple[str, str], _Place] = {}
        self._settings: dict[str, int] = {}

    def add(self, section: Inputs) -> None:
        """Put the tensors of a section's models in order."""
        experts = [(expert.index, expert) for expert in section.experts]
        bases = [(section.base, None)] if section.base else []
        names = (n for index, _ in (*experts, *bases) for n in self._vocabulary.tensors_of(index))
        for name in dict.fromkeys(names):
            found: dict[str, _Model] = {}
            for index, expert in (*experts, *bases):
                if name in self._vocabulary.tensors_of(index):
                    model = _Model(index, expert if expert and name in expert.adapted else None)
                    found.setdefault(model.address, model)
            models = list(found.values())
            table = self._table(section, models, name)
            for place in range(len(models)):
                self._add_tensor(name, place, models, table)

    def finish(self) -> dict[tuple[str, str], Source]:
        """Add the stages; where everything is read."""
        for number, (uri, problems) in enumerate(self._moved.items(), 1):
            sources = self._stages.write(problems, f"vocabulary-{number:02d}")
            for problem, source in zip(problems, sources, strict=True):
                self._found[uri, problem.tensor_name] = source
        return self._found

    def _table(self, section: Inputs, models: Sequence[_Model], name: str) -> RowTable:
        addresses = tuple(model.address for model in models)
        heights = tuple(model.index.tensors[name].shape[0] for model in models)
        base = section.base.uri if section.base is not None else None
        key = (addresses, heights, base)
        if key not in self._tables:
            uris = [model.index.uri for model in models]
            self._tables[key] = RowTable(self._vocabulary, addresses, uris, base, heights)
            if missing := self._tables[key].missing():
                self._warnings.append(
                    f"{len(missing)} tokens of the output are in none of {shorten_list(addresses)};"
                    f" their embeddings are zeros: {shorten_list([*map(repr, missing)])}."
                )
        return self._tables[key]

    def _add_tensor(self, name: str, place: int, models: Sequence[_Model], table: RowTable) -> None:
        model = models[place]
        stored = model.index.tensors[name]
        key = (model.address, stored.name)
        runs = table.runs(place)
        padding = self._vocabulary.num_rows - self._vocabulary.num_tokens
        is_whole = runs == [Run(stored.shape[0], ((place, 0),))] and not padding
        if is_whole and model.adapted is not None:
            return  # the factors are those of these rows
        used = sorted({number for run in runs for number, _ in run.parts})
        entries = {number: self._entry(models[number], name) for number in used}
        sources, moved = ranges_of(runs, {n: entry for n, (_, entry) in entries.items()})
        found = [self._source(entries[number][0], entry) for number, entry in sources]
        if len(runs) == 1 and len(runs[0].parts) == 1 and not padding:
            self._found[key] = found[0]
            return
        work = AlignmentWork(tuple(moved), padding)
        is_mean = padding > 0 or any(len(run.parts) > 1 for run in runs)
        dtypes = [entry.dtype for _, entry in sources] + ["F32"] * is_mean
        problem = Problem(
            tensor_name=key[1],
            shape=(self._vocabulary.num_rows, *stored.shape[1:]),
            dtype=promote(dtypes),
            setting=self._setting(work),
            base=None,
            experts=tuple(found),
            role="embedding",
        )
        self._moved.setdefault(key[0], []).append(_with_cost(problem, work, self._stages.budgets))

    def _entry(self, model: _Model, name: str) -> _Place:
        """Where a model's tensor with its rows in the old order lies."""
        if model.adapted is None:
            return model.index, model.index.tensors[name]
        key = (model.address, name)
        if key not in self._expanded:
            stage = f"adapted-{len(self._expanded) + 1:02d}"
            self._expanded[key] = adapted_tensor(
                model.adapted, name, self._builder, self._stages, stage
            )
        return self._expanded[key]

    def _source(self, index: CheckpointIndex | AdapterIndex | None, entry: TensorEntry) -> Source:
        if index is not None:
            return self._builder.source(index, entry, "")
        return Source(entry.file, entry.start, entry.end, entry.dtype, entry.name)

    def _setting(self, work: AlignmentWork) -> int:
        """The setting of this work; head and embedding share one."""
        data = msgspec.json.encode(work)
        key = hashlib.sha256(data).hexdigest()
        if key not in self._settings:
            setting = Setting(ALIGN, msgspec.json.decode(data))
            self._settings[key] = self._builder.settings.add(setting)
        return self._settings[key]


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
