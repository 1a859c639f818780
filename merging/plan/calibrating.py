"""What follows a merge: calibrated singular values of linear layers (the parameter ``svc``).

The method's own result becomes an intermediate file, in float32, and a last pass reads it with the
base and the experts. So it follows any method, in however many passes that merges.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from merging.errors import Fault
from merging.plan.intermediate import Intermediates, is_double
from merging.plan.plan import Problem
from merging.recipe.parse import recipe_error
from merging.roles import NOT_LINEAR
from merging.singular_values import SVC


def calibrate_after(
    problems: Sequence[Problem], merged: Sequence[Problem], stages: Intermediates
) -> list[Problem]:
    """The problems of the output, where the recipe asks for it with calibration as the last pass.

    Args:
        problems: As of a merge in one pass: with base and experts.
        merged: What makes the output's tensors without calibration, in the same order.
        stages: To which shards are added.

    Raises:
        RecipeError: ``incompatible_options``: the method has no base model.
    """
    finals = list(merged)
    places = [place for place, problem in enumerate(problems) if _is_calibrated(problem, stages)]
    if any(problems[place].base is None for place in places):
        detail = (
            "'svc' calibrates what was added to a base model, and this merge has none. Take a"
            " method with a base model, or leave it out."
        )
        raise recipe_error([Fault("/parameters/svc", "incompatible_options", detail)])
    results = stages.write(
        [
            stages.stored_as(merged[place], "F64" if is_double(problems[place]) else "F32")
            for place in places
        ],
        "merged",
    )
    for place, result in zip(places, results, strict=True):
        problem = msgspec.structs.replace(problems[place], given=(result,))
        finals[place] = stages.of_step(problem, SVC)
    return finals


def _is_calibrated(problem: Problem, stages: Intermediates) -> bool:
    """Whether it is a linear layer that the recipe's method merges, with calibration after."""
    is_layer = len(problem.shape) == 2 and problem.role not in NOT_LINEAR
    return is_layer and getattr(stages.parameters(problem), SVC, None) is not None
