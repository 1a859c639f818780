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
from merging.method import COMBINED, FINISH, MergeMethod, Reduction, Staged
from merging.plan.intermediate import Intermediates, is_double, part_of, problem_geometry
from merging.plan.plan import Problem, Source


class Staging:
    """Adds the passes that the problems of a merge need before their last one.

    Args:
        stages: Where they go.
    """

    def __init__(self, stages: Intermediates) -> None:
        self._stages = stages

    def stage(self, problems: Sequence[Problem]) -> list[Problem]:
        """The problems of the output, where need be as the last pass of several."""
        finals = list(problems)
        groups = self._groups(problems)
        places = sorted(place for group in groups for place in group)
        if not places:
            return finals
        method = self._stages.method(problems[places[0]])
        assert method is not None, "a recipe has one method with passes"
        assert method.staged is not None
        found: dict[int, Source] = {}
        given: dict[int, tuple[Source, ...]] = dict.fromkeys(places, ())
        for reduction in method.staged.reductions:
            maps = [self._map(reduction, problems[place], given[place]) for place in places]
            found = dict(zip(places, self._stages.write(maps, reduction.name), strict=True))
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
            results = self._stages.write(combinations, reduction.name + COMBINED)
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
            method = self._stages.method(problem)
            if method is None or method.staged is None:
                continue
            if problem.setting not in keys:
                keys[problem.setting] = self._key(method, method.staged, problem)
            key = keys[problem.setting]
            if key is not None:
                groups.setdefault(repr(key), []).append(place)
            elif self._is_too_large(method.staged, problem):
                groups[f"alone {place}"] = [place]
        return list(groups.values())

    def _is_too_large(self, staged: Staged, problem: Problem) -> bool:
        """Whether a tensor by itself has to take several passes, and may."""
        is_held = self._stages.budgets.hold(problem) or is_double(problem)
        return not is_held and staged.takes_alone(self._stages.parameters(problem))

    def _key(self, method: MergeMethod, staged: Staged, problem: Problem) -> Any:
        experts = self._stages.expert_parameters(problem)
        return staged.group(
            self._stages.parameters(problem),
            [method.expert_parameters.model_validate(expert) for expert in experts],
        )

    def _map(self, reduction: Reduction, problem: Problem, given: tuple[Source, ...]) -> Problem:
        """What is found of one tensor."""
        floats = "F64" if is_double(problem) else "F32"
        return self._stages.of_step(
            msgspec.structs.replace(
                problem,
                shape=(reduction.entries(problem_geometry(problem)),),
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
            part_of(source, reduction.part(problem_geometry(problem)))
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
        return self._stages.of_step(combined, reduction.name + COMBINED)

    def _finish(
        self, staged: Staged, problem: Problem, found: Source, given: tuple[Source, ...]
    ) -> Problem:
        """The merge of one tensor."""
        if staged.keeps_map:
            entries = problem.num_entries
            experts = (part_of(found, slice(entries)),)
            given = (*given, part_of(found, slice(entries, None)))
            problem = msgspec.structs.replace(problem, experts=experts, parts=())
        return self._stages.of_step(msgspec.structs.replace(problem, given=given), FINISH)
