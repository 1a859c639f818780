"""Whether every problem fits the memory that a worker may use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from merging.errors import Fault, PlanError
from merging.plan.cost import Budgets
from merging.plan.plan import Problem, Setting
from merging.plan.wording import SHOWN


@dataclass(frozen=True, slots=True)
class _Limit:
    """One kind of memory: the option that bounds it, the bound, and what a problem takes of it."""

    memory: str
    option: str
    num_bytes: int
    need: Callable[[Problem], int]


def check_fit(problems: Sequence[Problem], settings: Sequence[Setting], budgets: Budgets) -> None:
    """Refuse a merge with a problem that does not fit, not even in the smallest blocks of rows.

    Args:
        problems: All problems.
        settings: What their ``setting`` refers to.
        budgets: What a worker may use.

    Raises:
        PlanError: ``does_not_fit``, with a fault for each of the ten largest, and the number that
            the worst one needs.
    """
    limits = [_Limit("host memory", "memory_budget", budgets.host, lambda p: p.host_bytes)]
    if budgets.device is not None:
        limits.append(
            _Limit("GPU memory", "device_memory_budget", budgets.device, lambda p: p.device_bytes)
        )
    for limit in limits:
        large = [p for p in problems if limit.need(p) > limit.num_bytes]
        if large:
            large.sort(key=limit.need, reverse=True)
            raise _does_not_fit(large, settings, limit)


def _does_not_fit(
    large: Sequence[Problem], settings: Sequence[Setting], limit: _Limit
) -> PlanError:
    """The error for problems that are too large, the largest first."""

    def describe(problem: Problem) -> str:
        blocks = f" in blocks of {problem.row_block} rows" if problem.row_block else ""
        return (
            f"Tensor {problem.tensor_name!r} {list(problem.shape)} needs {limit.need(problem)}"
            f" bytes of {limit.memory} ({settings[problem.setting].method}{blocks}); the"
            f" {limit.option.replace('_', ' ')} is {limit.num_bytes} bytes."
        )

    worst = large[0]
    others = f" {len(large) - 1} more tensors do not fit." if len(large) > 1 else ""
    return PlanError(
        f"{describe(worst)}{others} Set {limit.option} to {limit.need(worst)} or more, on workers"
        " that have it; or leave such tensors out with the parameter 'touch'; or take a method"
        " that works in tiles, such as task_arithmetic.",
        code="does_not_fit",
        faults=[Fault("", "does_not_fit", describe(problem)) for problem in large[:SHOWN]],
        context={
            "tensor_name": worst.tensor_name,
            "needed_bytes": limit.need(worst),
            limit.option: limit.num_bytes,
        },
    )
