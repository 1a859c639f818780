"""What is done with the problems of a shard: one thing, or in a sweep several variants of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merging.layered import group_by_problem
from merging.method import Step, get_method
from merging.plan.cost import is_streaming, is_tiled, takes_adapters
from merging.plan.plan import COPY, Setting
from merging.steps import step_of


@dataclass(frozen=True, slots=True)
class Applied:
    """A setting with its method's step looked up (None is a copy) and its parameters validated."""

    step: Step | None
    parameters: Any = None
    expert_parameters: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Treatment:
    """What the variants do with a problem.

    Attributes:
        applied: Different things that are done, each once.
        files: For each of these, the numbers of the shard's files that get the result.
        groups: Places in ``applied``, together where a layer's problem is shared.
        is_tiled: The tensor is worked on in tiles.
        is_sum: The results of tiles are added up.
        is_fold: The result of the last tile is the tensor's.
        is_flat: Inputs are handed over flat.
        takes_adapters: Adapters are handed over as they are.
        is_streaming: Experts are taken one at a time and forgotten.
    """

    applied: tuple[Applied, ...]
    files: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    is_tiled: bool
    is_sum: bool
    is_fold: bool
    is_flat: bool
    takes_adapters: bool
    is_streaming: bool


def treatment(setting: Setting, num_files: int, *, are_apart: bool) -> Treatment:
    """Of problems with this setting.

    Args:
        setting: Theirs.
        num_files: Of the shard.
        are_apart: Variants are given results of their own, so that none has another's result.
    """
    different: list[Setting] = []
    files: list[list[int]] = []
    for number in range(num_files):
        own = setting.of_variant(number)
        if are_apart or own not in different:
            different.append(own)
            files.append([number])
        else:
            files[different.index(own)].append(number)
    applied = [_apply(own) for own in different]
    pairs = [(one.step, one.parameters) for one in applied]
    first = applied[0].step
    return Treatment(
        applied=tuple(applied),
        files=_frozen(files),
        groups=_frozen(group_by_problem(pairs)),
        is_tiled=is_tiled([step for step, _ in pairs]),
        is_sum=first is not None and first.separable == "sum",
        is_fold=first is not None and first.separable == "fold",
        is_flat=first is not None and first.flat,
        takes_adapters=takes_adapters([step for step, _ in pairs]),
        is_streaming=is_streaming(pairs),
    )


def _frozen(lists: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, lists))


def _apply(setting: Setting) -> Applied:
    if setting.method == COPY:
        return Applied(None)
    method = get_method(setting.method)
    return Applied(
        step_of(method, setting.step),
        method.parameters.model_validate(setting.parameters),
        tuple(method.expert_parameters.model_validate(p) for p in setting.expert_parameters),
    )
