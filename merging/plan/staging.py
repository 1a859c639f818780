"""Methods that take several passes over a model: the shards before the output's.

A tensor of such a method is merged by the last pass, ``finish``. Each reduction before it is a
stage of *maps*, one for every tensor, whose results lie in intermediate files, and one of
*combinations*, one for every group of tensors that are reduced together, unless a tensor goes by
what its own map found. The inputs are read again in every pass that needs them, which shows in the
plan's bytes.

The variants of a sweep go through the same passes together. So maps and the last pass read the
inputs once for all of them, and leave a result for each; what tensors are reduced together, each
variant has for itself. One whose parameters ask for no passes takes part with each tensor as a
group by itself, where the result is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from merging.dtypes import ITEM_SIZE
from merging.errors import Fault
from merging.method import COMBINED, FINISH, Reduction, Staged
from merging.plan.intermediate import Intermediates, is_double, part_of, problem_geometry
from merging.plan.plan import Problem, Source
from merging.plan.variants import AppliedVariant
from merging.recipe.parse import recipe_error

_Each = Sequence[tuple[Source, ...]]
"""Something of every variant."""


class _Wanted(NamedTuple):
    """What a variant's parameters ask for.

    Attributes:
        staged: The passes of its method, if it has some that give its result.
        key: Tensors of the same key are reduced together; None if it needs no passes.
        parameters: Recipe-level ones.
    """

    staged: Staged | None
    key: Any = None
    parameters: Any = None

    def form(self, problem: Problem) -> list[Any]:
        """What variants must have in common to go through the passes over a tensor together."""
        assert self.staged is not None
        geometry = problem_geometry(problem)
        return [
            self.staged.keeps_map,
            *(
                (r.name, r.entries(geometry, self.parameters), r.dtype, r.map.separable, r.map.flat)
                for r in self.staged.reductions
                if r.needed(self.parameters)
            ),
        ]


class Staging:
    """Adds the passes that the problems of a merge need before their last one.

    Args:
        stages: Where they go.
    """

    def __init__(self, stages: Intermediates) -> None:
        self._stages = stages
        self._known: dict[int, list[_Wanted]] = {}
        self._numbers = range(stages.settings.num_variants)

    def stage(self, problems: Sequence[Problem]) -> list[Problem]:
        """The problems of the output, where need be as the last pass of several.

        Raises:
            RecipeError: ``incompatible_options``: variants take different passes.
        """
        finals = list(problems)
        places = [place for place, problem in enumerate(problems) if self._is_staged(problem)]
        if not places:
            return finals
        passes = [one.staged for one in self._wanted(problems[places[0]]) if one.staged]
        own = [{reduction.name: reduction for reduction in staged.reductions} for staged in passes]
        groups = [
            (number, group)
            for number in self._numbers
            for group in self._groups(problems, places, number)
        ]
        found: dict[int, tuple[Source, ...]] = {}
        given: dict[int, list[tuple[Source, ...]]] = {p: [()] * len(passes) for p in places}
        for name, reduction in own[0].items():
            reduced = [place for place in places if self._needs(problems[place], reduction)]
            needing = [one for one in groups if self._needs(problems[one[1][0]], reduction)]
            maps = [self._map(reduction, problems[place], given[place]) for place in reduced]
            found |= zip(reduced, self._stages.write_each(maps, name), strict=True)
            if reduction.combine is None:
                results = [found[place][variant] for variant, [place] in needing]
            else:
                combinations = [
                    self._combination(
                        own[variant][name],
                        f"{name}-{number}",
                        [self._stages.of_variant(problems[place], variant) for place in group],
                        [found[place][variant] for place in group],
                        given[group[0]][variant],
                    )
                    for number, (variant, group) in enumerate(needing)
                ]
                results = self._stages.write(combinations, name + COMBINED)
            for (variant, group), result in zip(needing, results, strict=True):
                for place in group:
                    given[place][variant] += (result,)
        for place in places:
            last = found.get(place, ())
            finals[place] = self._finish(passes[0], problems[place], last, given[place])
        return finals

    def _needs(self, problem: Problem, reduction: Reduction) -> bool:
        """Whether a tensor's parameters ask for a pass; those of all variants do, or of none."""
        return reduction.needed(self._wanted(problem)[0].parameters)

    def _is_staged(self, problem: Problem) -> bool:
        """Whether a tensor takes several passes: a variant needs them, or it is too large else."""
        wanted = self._wanted(problem)
        needing = next((n for n, one in enumerate(wanted) if one.key is not None), None)
        first = wanted[needing or 0]
        others = [n for n, one in enumerate(wanted) if not _are_alike(one, first, problem)]
        if needing is None:
            is_held = self._stages.budgets.hold(problem)
            if others or is_held or first.staged is None:
                return False
            return first.staged.takes_double or not is_double(problem)
        if others:
            raise recipe_error([self._refusal(number, needing) for number in others])
        return True

    def _refusal(self, number: int, needing: int) -> Fault:
        settings = self._stages.settings
        return settings.fault(
            number,
            f"{settings.name(needing)} takes several passes over the model, which variants share,"
            f" and {settings.name(number)} does not take the same. Submit them as two merges.",
        )

    def _wanted(self, problem: Problem) -> list[_Wanted]:
        """What each variant's parameters ask for."""
        if problem.setting not in self._known:
            variants = self._stages.settings.variants(problem.setting)
            self._known[problem.setting] = [_wanted(variant) for variant in variants]
        return self._known[problem.setting]

    def _groups(
        self, problems: Sequence[Problem], places: Sequence[int], number: int
    ) -> list[list[int]]:
        """Places of the problems that a variant reduces together, together."""
        groups: dict[str, list[int]] = {}
        for place in places:
            key = self._wanted(problems[place])[number].key
            name = f"alone {place}" if key is None else repr(key)
            groups.setdefault(name, []).append(place)
        return list(groups.values())

    def _map(self, reduction: Reduction, problem: Problem, given: _Each) -> Problem:
        """What is found of one tensor."""
        floats = "F64" if is_double(problem) else "F32"
        parameters = self._stages.parameters(problem)
        return self._stages.of_step(
            msgspec.structs.replace(
                with_given(problem, given),
                shape=(reduction.entries(problem_geometry(problem), parameters),),
                source_shape=problem.shape,
                dtype=reduction.dtype or floats,
            ),
            reduction.name,
            reduction.ignores,
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
        self, staged: Staged, problem: Problem, found: Sequence[Source], given: _Each
    ) -> Problem:
        """The merge of one tensor; the last map, if there was one, found something of it."""
        if staged.keeps_map:
            entries = problem.num_entries
            own = tuple(part_of(source, slice(entries)) for source in dict.fromkeys(found))
            problem = msgspec.structs.replace(
                problem, experts=own, parts=(), has_own_experts=len(own) > 1
            )
            rest = [part_of(source, slice(entries, None)) for source in found]
            given = [(*one, other) for one, other in zip(given, rest, strict=True)]
        return self._stages.of_step(with_given(problem, given), FINISH)


def with_given(problem: Problem, given: _Each) -> Problem:
    """The problem with what each variant is given."""
    if len(set(given)) == 1:
        return msgspec.structs.replace(problem, given=given[0])
    flat = tuple(itertools.chain(*given))
    return msgspec.structs.replace(problem, given=flat, num_given_apart=len(given))


def _wanted(variant: AppliedVariant) -> _Wanted:
    method = variant.method
    if method is None or method.staged is None:
        return _Wanted(None)
    experts = variant.setting.expert_parameters
    key = method.staged.group(
        variant.parameters,
        [method.expert_parameters.model_validate(expert) for expert in experts],
    )
    return _Wanted(method.staged, key, variant.parameters)


def _are_alike(one: _Wanted, other: _Wanted, problem: Problem) -> bool:
    """Whether both have passes that read the same and leave results of the same form."""
    if one.staged is None or other.staged is None:
        return False
    return one.form(problem) == other.form(problem)
