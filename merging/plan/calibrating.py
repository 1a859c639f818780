"""What follows a merge: calibrated singular values of linear layers (the parameter ``svc``).

The method's own result becomes an intermediate file, in float32, and a last pass reads it with the
base and the experts. So it follows any method, in however many passes that merges.
"""

from __future__ import annotations

from collections.abc import Sequence

from merging.errors import Fault
from merging.plan.intermediate import Intermediates, is_double
from merging.plan.plan import Problem
from merging.plan.staging import with_given
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
        RecipeError: ``incompatible_options``: the method has no base model, or not all variants
            are calibrated.
    """
    finals = list(merged)
    places = [place for place, problem in enumerate(problems) if _is_calibrated(problem, stages)]
    if any(problems[place].base is None for place in places):
        detail = (
            "'svc' calibrates what was added to a base model, and this merge has none. Take a"
            " method with a base model, or leave it out."
        )
        raise recipe_error([Fault("/parameters/svc", "incompatible_options", detail)])
    results = stages.write_each(
        [
            stages.stored_as(merged[place], "F64" if is_double(problems[place]) else "F32")
            for place in places
        ],
        "merged",
    )
    for place, result in zip(places, results, strict=True):
        given = with_given(problems[place], [(one,) for one in result])
        finals[place] = stages.of_step(given, SVC)
    return finals


def _is_calibrated(problem: Problem, stages: Intermediates) -> bool:
    """Whether it is a linear layer that the recipe's method merges, with calibration after."""
    if len(problem.shape) != 2 or problem.role in NOT_LINEAR:
        return False
    variants = stages.settings.variants(problem.setting)
    asked = [getattr(variant.parameters, SVC, None) is not None for variant in variants]
    if any(asked) and not all(asked):
        detail = (
            "'svc' is one more pass over the model, which variants share, and others of this sweep"
            " do without it. Give it to all of them, or submit them as two merges."
        )
        raise recipe_error([stages.settings.fault(asked.index(True), detail)])
    return asked[0]
