"""Embeddings and heads with their rows in the order of the output's tokens, before they are merged.

Models whose vocabularies differ have tensors of different heights. Each is put in order by a stage
before the merge: a file in the workspace, made from the rows that it needs, which are all that is
read. After that every method and parameter means what it means elsewhere. A model whose rows stand
in that order already is read where it lies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merging.checkpoint.index import CheckpointIndex
from merging.plan.expanding import adapted_tensor
from merging.plan.inputs import Expert, Inputs
from merging.plan.intermediate import Intermediates
from merging.plan.moving import Place, RowMover
from merging.plan.plan import Problem, Source
from merging.plan.problems import ProblemBuilder
from merging.plan.vocabulary import RowTable, Run, Vocabulary
from merging.plan.wording import shorten_list


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
            it.
    """
    alignment = _Alignment(vocabulary, builder, stages, warnings)
    for section in inputs.sections:
        alignment.add(section)
    return alignment.finish()


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
        self._expanded: dict[tuple[str, str], Place] = {}
        self._mover = RowMover(builder, stages)

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
        places = {number: self._entry(models[number], name) for number in used}
        shape = (self._vocabulary.num_rows, *stored.shape[1:])
        moved = self._mover.move(stored.name, shape, runs, places, padding=padding)
        if isinstance(moved, Source):
            self._found[key] = moved
        else:
            self._moved.setdefault(key[0], []).append(moved)

    def _entry(self, model: _Model, name: str) -> Place:
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
