"""The steps of a method by the names that plans have for them: its own, and those of any method."""

from __future__ import annotations

from merging.factored import FACTORS, factor_step
from merging.method import MergeMethod, Step
from merging.singular_values import CALIBRATE, SVC


def step_of(method: MergeMethod, name: str) -> Step:
    """A step: the method, one of its own, the calibration after it, or its result as factors."""
    if name.startswith(FACTORS):
        return factor_step(method, int(name.removeprefix(FACTORS)))
    return CALIBRATE if name == SVC else method.step(name)
