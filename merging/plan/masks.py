"""Tasks' masks beside a merged checkpoint: a tensor of bits for each tensor that is merged."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from merging.errors import Fault, RecipeError
from merging.method import MASKS, get_method
from merging.plan.intermediate import Intermediates
from merging.plan.packing import pack
from merging.plan.plan import Problem, Shard
from merging.recipe import Recipe
from merging.task_masks import FILE_PREFIX, TENSOR_SUFFIX


def check_masks(
    recipe: Recipe,
    problems: Sequence[Problem],
    stages: Intermediates,
    *,
    has_own_tokens: bool,
) -> None:
    """Refuse masks that would not suit the published model, or the base model later.

    Args:
        recipe: A checked recipe.
        problems: Of the merged checkpoint.
        stages: Knows methods and parameters.
        has_own_tokens: The vocabulary is not that of the base model.

    Raises:
        RecipeError: ``incompatible_options``, naming the tokenizer or ``svc``.
    """
    method = get_method(recipe.merge_method)
    if not method.task_masks:
        return
    faults = []
    if has_own_tokens and recipe.tokenizer is not None:
        detail = (
            f"{method.name} makes tasks' models of the base model's own tensors, and other tokens"
            " give these other rows. Leave out the tokenizer, and merge models of one vocabulary."
        )
        faults.append(Fault(recipe.tokenizer.pointer, "incompatible_options", detail))
    merged = [problem for problem in problems if stages.method(problem) is method]
    if any(stages.parameters(problem).svc is not None for problem in merged):
        detail = (
            f"'svc' changes the shared model after {method.name} has made the masks for it: leave"
            " it out."
        )
        faults.append(Fault("/parameters/svc", "incompatible_options", detail))
    if faults:
        raise RecipeError(faults[0].detail, code="incompatible_options", faults=faults)


def mask_problems(problems: Sequence[Problem], stages: Intermediates) -> list[Problem]:
    """What finds the masks, for each tensor whose method publishes some: U8, experts×⌈entries/8⌉.

    Args:
        problems: Of the merged checkpoint.
        stages: Knows methods and costs.
    """
    masks = []
    for problem in problems:
        method = stages.method(problem)
        if method is not None and method.task_masks:
            mask = msgspec.structs.replace(
                problem,
                tensor_name=problem.tensor_name + TENSOR_SUFFIX,
                shape=(problem.num_experts, -(-problem.num_entries // 8)),
                source_shape=problem.shape,
                dtype="U8",
            )
            masks.append(stages.of_step(mask, MASKS))
    return masks


def mask_shards(
    masks: Sequence[Problem], max_shard_size: int, *, first_index: int
) -> tuple[Shard, ...]:
    """The files of masks.

    Args:
        masks: Of :func:`mask_problems`.
        max_shard_size: Largest file in bytes; a tensor counts as what is read for it.
        first_index: Shards that come before these.
    """
    shards = pack(masks, max_shard_size, first_index=first_index, stage=FILE_PREFIX)
    return tuple(msgspec.structs.replace(shard, kind="masks") for shard in shards)
