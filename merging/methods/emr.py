"""EMR-Merging: one shared model, and for each task a bit mask and a factor that give its own.

Source: Huang et al., "EMR-Merging: Tuning-Free High-Performance Model Merging", NeurIPS 2024,
arXiv:2405.17461, section 3.2. In each entry the sign of the mean task vector is elected, and of
those with that sign the largest magnitude makes τ_uni. Task t's model is
W0 + γ_t M_t · τ_uni: its mask M_t keeps the entries where T_t has the elected sign, and
γ_t = Σ|T_t| / Σ|M_t · τ_uni| over the whole model.
Differences from the source: γ_t is the paper's ratio of sums over all entries, where the authors'
code sums means of tensors. The shared model W0 + λ τ_uni is published as an ordinary checkpoint in
its type; a task's model is made of the τ_uni that this holds. γ_t includes 1/λ.

Needs the base model. Separable anywhere. The masks are files of their own beside the weights, for
which the inputs are read once more (:mod:`merging.task_masks`).
Precision: task vectors in float32 (float64 if an input is), sums in float64, one rounding.
Deterministic: yes; a mean of exactly 0 elects the negative sign.
Cost: 4 E N flops for E experts of N entries, 8 E N for the masks; E + 5 blocks of scratch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from merging.errors import NumericalError
from merging.method import (
    MASKS,
    OWN,
    Cost,
    Geometry,
    MergeMethod,
    Step,
    Task,
    register,
)
from merging.parameters import TaskVectorParameters

if TYPE_CHECKING:
    import torch


class EmrParameters(TaskVectorParameters):
    """Recipe-level parameters."""

    scale: float = Field(
        default=1.0,
        alias="lambda",
        gt=0,
        description=(
            "λ, the factor on the elected task vector in the shared checkpoint; the tasks' models"
            " do not depend on it but for rounding."
        ),
    )


def merge_emr(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """The shared model's tensor, or a tile of it."""
    from merging.ops.elected import merge_elected

    assert base is not None
    return merge_elected(base, list(experts), task.parameters.scale, task.out)


def find_masks(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """The masks of all tasks for a tensor, E×⌈N/8⌉; those of a tile leave the rest 0.

    Reports what the rescalers are made of: ``task_sums`` (Σ|T_t|) and ``masked_sums``.

    Raises:
        NumericalError: ``non_finite_input``: a task vector is not finite.
    """
    import torch

    from merging.ops.elected import agreement_masks

    assert base is not None
    found, sums = agreement_masks(base, list(experts), task.parameters.scale)
    for number, total in enumerate(sums[:, 0].tolist()):
        if not math.isfinite(total):
            raise NumericalError(
                f"The task vector of expert {number + 1} is not finite in {task.tensor_name!r}:"
                " no factor can be found for its model. Repair that checkpoint or leave it out.",
                code="non_finite_input",
                context={"tensor_name": task.tensor_name},
            )
    for name, column in (("task_sums", sums[:, 0]), ("masked_sums", sums[:, 1])):
        before = task.figures[name] if task.offset else [0.0] * len(column)
        task.figures[name] = [a + b for a, b in zip(before, column.tolist(), strict=True)]
    masks = torch.zeros((len(found), -(-math.prod(task.shape) // 8)), dtype=torch.uint8)
    first = task.offset // 8
    masks[:, first : first + found.shape[1]] = found
    return masks


def make_own(base: torch.Tensor | None, parts: Iterator[torch.Tensor], task: Task) -> torch.Tensor:
    """A task's own tensor, or a tile of it, of the shared one and its mask: λ is its rescaler."""
    from merging.ops.elected import add_masked

    assert base is not None
    shared, mask = parts
    return add_masked(base, shared, mask, task.parameters.scale, task.out)


def emr_cost(geometry: Geometry, parameters: EmrParameters) -> Cost:
    """A difference, a sum, a product and a comparison for each expert and entry."""
    del parameters
    return Cost(
        flops=4.0 * geometry.num_experts * geometry.num_entries,
        workspace_bytes=geometry.block_bytes(num_buffers=geometry.num_experts + 6),
    )


def _masks_cost(geometry: Geometry, parameters: EmrParameters) -> Cost:
    merging = emr_cost(geometry, parameters)
    masks = geometry.num_experts * -(-geometry.num_entries // 8)
    workspace = geometry.block_bytes(num_buffers=geometry.num_experts + 8)
    return Cost(2 * merging.flops, workspace + 2 * masks)


register(
    MergeMethod(
        name="emr",
        title="EMR-Merging (elect, mask and rescale)",
        summary=(
            "Publishes one shared model and beside it a bit per parameter and a factor for each"
            " task, from which `mergeyard rebuild` makes every task's own model again, near to its"
            " expert."
        ),
        source="Huang et al., NeurIPS 2024, arXiv:2405.17461, section 3.2",
        merge=merge_emr,
        cost=emr_cost,
        parameters=EmrParameters,
        rounds=True,
        task_masks={
            MASKS: Step(merge=find_masks, cost=_masks_cost, separable="sum"),
            OWN: Step(merge=make_own, cost=emr_cost, rounds=True, flat=True),
        },
    )
)
