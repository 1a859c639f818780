"""Linear: the weighted average of the experts' weights, entry by entry.

Source: Wortsman et al., "Model soups", ICML 2022, arXiv:2203.05482: the average of fine-tuned
models; here with a weight for each.
Differences from the source: none.

Needs no base model. Separable anywhere: each entry of the result depends on that entry alone.
Precision: computed in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes. Cost: 2 E N flops for E experts of N entries; one block of scratch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field

from merging.errors import RecipeError
from merging.method import Cost, Geometry, MergeMethod, Task, register
from merging.ops.blocks import block_size, result_for, rounded_blocks, work_dtype
from merging.parameters import TouchParameters, WeightParameters

if TYPE_CHECKING:
    import torch


class LinearParameters(TouchParameters):
    """Recipe-level parameters."""

    normalize: bool = Field(
        default=True,
        description="Divide by the sum of the weights, which makes the sum an average.",
    )


def merge_linear(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Average one tensor, or a tile of one.

    Raises:
        RecipeError: ``bad_parameter`` if weights that should be normalised add up to 0.
    """
    import torch

    del base
    tensors = list(experts)
    weights = [parameters.weight for parameters in task.expert_parameters]
    divisor = sum(weights) if task.parameters.normalize else 1.0
    if divisor == 0:
        raise RecipeError(
            f"The weights of {task.tensor_name!r} add up to 0, so that they cannot be normalised."
            " Change the weights or set normalize to false.",
            code="bad_parameter",
            context={"tensor_name": task.tensor_name},
        )

    shape, device = tensors[0].shape, tensors[0].device
    num_entries = shape.numel()
    dtype = work_dtype(tensors)
    merged_N = result_for(tensors[0], dtype, task.out)
    scratch = torch.empty(min(num_entries, block_size(device)), dtype=dtype, device=device)
    experts_N = [tensor.reshape(-1) for tensor in tensors]
    for block, total in rounded_blocks(merged_N, dtype):
        total.zero_()
        for expert_N, weight in zip(experts_N, weights, strict=True):
            term = scratch[: total.numel()].copy_(expert_N[block])
            total.add_(term if weight == 1 else term.mul_(weight))
        total.div_(divisor)
    return merged_N.view(shape)


def linear_cost(geometry: Geometry, parameters: LinearParameters) -> Cost:
    """A product and a sum per expert and entry."""
    del parameters
    return Cost(
        flops=2.0 * geometry.num_experts * geometry.num_entries,
        workspace_bytes=geometry.block_bytes(num_buffers=1),
    )


register(
    MergeMethod(
        name="linear",
        title="Linear (weighted average, model soup)",
        summary=(
            "The weighted average of the experts' weights. Simple and safe when the experts are"
            " close to one another; needs no base model."
        ),
        source="Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482",
        merge=merge_linear,
        cost=linear_cost,
        parameters=LinearParameters,
        expert_parameters=WeightParameters,
        needs_base=False,
        default_rest="mean",
        rounds=True,
    )
)
