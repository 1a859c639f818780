"""Methods that take several passes over a model: the shards before the output's.

A tensor of such a method is merged by the last pass, ``finish``. Each reduction before it is a
stage of *maps*, one for every tensor, whose results lie in intermediate files, and one of
*combinations*, one for every group of tensors that are reduced together. The inputs are read again
in every pass that needs them, which shows in the plan's bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from merging.dtypes import ITEM_SIZE
from merging.method import COMBINED, FINISH, Geometry, MergeMethod, Reduction, Staged, get_method
from merging.plan.cost import Budgets, problem_cost, problem_load
from merging.plan.packing import intermediate_file, pack, tensor_sources
from merging.plan.plan import COPY, Problem, Shard, Source, SourceFile
from merging.plan.variants import VariantSettings


class Staging:
    """Adds the passes that the problems of a merge need before their last one.

    Args:
        settings: The plan's, to which settings of passes are added.
        files: The plan's, to which intermediate files are added.
        budgets: What a worker may use.
        max_shard_size: Largest file in bytes.
        output_uri: Folder of the output.

    Attributes:
        shards: What is to be done before the output's shards, in order.
    """

    def __init__(
        self,
        settings: VariantSettings,
        files: list[SourceFile],
        budgets: Budgets,
        *,
        max_shard_size: int,
        output_uri: str,
    ) -> None:
        self.shards: list[Shard] = []
        self._settings = settings
        self._files = files
        self._budgets = budgets
        self._max_shard_size = max_shard_size
        self._output_uri = output_uri

    def stage(self, problems: Sequence[Problem]) -> list[Problem]:
        """The problems of the output, where need be as the last pass of several."""
        finals = list(problems)
        groups = self._groups(problems)
        places = sorted(place for group in groups for place in group)
        if not places:
            return finals
        method = self._method(problems[places[0]].setting)
        assert method is not None, "a recipe has one method with passes"
        assert method.staged is not None
        found: dict[int, Source] = {}
        given: dict[int, tuple[Source, ...]] = dict.fromkeys(places, ())
        for reduction in method.staged.reductions:
            maps = [self._map(reduction, problems[place], given[place]) for place in places]
            found = dict(zip(places, self._write(maps, reduction.name), strict=True))
            combinations = [
                self._combination(
                    reduction,
                    f"{reduction.name}-{number}",
                    [problems[place] for place in group],
                    [found[place] for place in group],
                    given[group[0]],
                )
                for number, group in enumerate(groups)
            ]
            results = self._write(combinations, reduction.name + COMBINED)
            for group, result in zip(groups, results, strict=True):
                for place in group:
                    given[place] += (result,)
        for place in places:
            finals[place] = self._finish(method.staged, problems[place], found[place], given[place])
        return finals

    def _groups(self, problems: Sequence[Problem]) -> list[list[int]]:
        """Places of the problems that take several passes: those reduced together, together."""
        keys: dict[int, Any] = {}
        groups: dict[str, list[int]] = {}
        for place, problem in enumerate(problems):
            method = self._method(problem.setting)
            if method is None or method.staged is None:
                continue
            if problem.setting not in keys:
                keys[problem.setting] = self._key(method, method.staged, problem.setting)
            key = keys[problem.setting]
            if key is not None:
                groups.setdefault(repr(key), []).append(place)
            elif not (self._budgets.hold(problem) or is_double(problem)):
                groups[f"alone {place}"] = [place]
        return list(groups.values())

    def _key(self, method: MergeMethod, staged: Staged, setting: int) -> Any:
        experts = self._settings.settings[setting].expert_parameters
        return staged.group(
            self._settings.parameters(setting),
            [method.expert_parameters.model_validate(expert) for expert in experts],
        )

    def _method(self, setting: int) -> MergeMethod | None:
        name = self._settings.settings[setting].method
        return None if name == COPY else get_method(name)

    def _map(self, reduction: Reduction, problem: Problem, given: tuple[Source, ...]) -> Problem:
        """What is found of one tensor."""
        floats = "F64" if is_double(problem) else "F32"
        return self._problem(
            msgspec.structs.replace(
                problem,
                shape=(reduction.entries(_geometry(problem)),),
                source_shape=problem.shape,
                dtype=reduction.dtype or floats,
                given=given,
            ),
            reduction.name,
        )

    def _combination(
        self,
        reduction: Reduction,
        name: str,
        problems: Sequence[Problem],
        found: Sequence[Source],
        given: tuple[Source, ...],
    ) -> Problem:
        """What the maps of a group say together."""
        parts = tuple(
            _entries(source, reduction.part(_geometry(problem)))
            for problem, source in zip(problems, found, strict=True)
        )
        longest = max(part.num_bytes // ITEM_SIZE[part.dtype] for part in parts)
        combined = Problem(
            tensor_name=name,
            shape=(reduction.combined_entries(problems[0].num_experts),),
            dtype=reduction.combined_dtype,
            setting=problems[0].setting,
            base=None,
            experts=parts,
            source_shape=(longest,),
            given=given,
        )
        return self._problem(combined, reduction.name + COMBINED)

    def _finish(
        self, staged: Staged, problem: Problem, found: Source, given: tuple[Source, ...]
    ) -> Problem:
        """The merge of one tensor."""
        if staged.keeps_map:
            entries = problem.num_entries
            experts = (_entries(found, slice(entries)),)
            given = (*given, _entries(found, slice(entries, None)))
            problem = msgspec.structs.replace(problem, experts=experts, parts=())
        return self._problem(msgspec.structs.replace(problem, given=given), FINISH)

    def _problem(self, problem: Problem, step: str) -> Problem:
        """A problem of this step of its method, with what that costs."""
        method = self._method(problem.setting)
        assert method is not None
        parameters = self._settings.parameters(problem.setting)
        steps = [(method.step(step), parameters)]
        cost = problem_cost(steps, problem_load(problem), self._budgets)
        return msgspec.structs.replace(
            problem,
            setting=self._settings.step(problem.setting, step),
            row_block=cost.row_block,
            flops=cost.flops,
            host_bytes=cost.host_bytes,
            device_bytes=cost.device_bytes,
        )

    def _write(self, problems: Sequence[Problem], stage: str) -> list[Source]:
        """Have these results written to intermediate files; where each will be."""
        first = len(self.shards)
        shards = pack(problems, self._max_shard_size, first_index=first, stage=stage)
        places: dict[str, Source] = {}
        for shard in shards:
            places |= tensor_sources(shard, len(self._files))
            self._files.append(intermediate_file(self._output_uri, shard))
        self.shards += shards
        return [places[problem.tensor_name] for problem in problems]


def is_double(problem: Problem) -> bool:
    """Whether an input is float64, so that the method computes in float64."""
    return any(source.dtype == "F64" for source in problem.sources)


def _geometry(problem: Problem) -> Geometry:
    return Geometry(problem.shape, problem.num_experts, transposed=problem.transposed)


def _entries(source: Source, entries: slice) -> Source:
    """Some entries of a source."""
    size = ITEM_SIZE[source.dtype]
    first, last, _ = entries.indices(source.num_bytes // size)
    return Source(
        source.file, source.start + first * size, source.start + last * size, source.dtype
    )
