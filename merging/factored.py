"""Merging a layer into factors: a step that every method has, for results that are adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from merging.method import Cost, Geometry, MergeMethod, Step, Task

if TYPE_CHECKING:
    import torch

    from merging.ops.low_rank import Adapter

FACTORS = "factors-"
"""In front of the rank, in the name of the step."""

_TOLD = 0.01
"""Of an update's norm: what an adapter lacks of it is told of from here on."""


def factor_step(method: MergeMethod, rank: int) -> Step:
    """lora_A (rank×I) and lora_B (O×rank) of adapters' merged update, flat, one after the other."""

    def merge(_: torch.Tensor | None, experts: Iterator[Any], task: Task) -> torch.Tensor:
        return _merge_into_factors(method, list(experts), task, rank)

    def cost(geometry: Geometry, parameters: Any) -> Cost:
        rows, columns = geometry.matrix
        inner = method.cost(geometry, parameters)
        span = min(sum(geometry.ranks), rows, columns)
        flops = 4.0 * rows * columns * span + 20.0 * (rows + columns) * span**2
        entries = 3 * rows * columns + (rows + columns) * (4 * span + rank)
        return Cost(inner.flops + flops, inner.workspace_bytes + 4 * entries)

    return Step(merge=merge, cost=cost, separable="whole", takes_adapters=True)


def _merge_into_factors(
    method: MergeMethod, adapters: Sequence[Adapter], task: Task, rank: int
) -> torch.Tensor:
    """Merge adapters of a stored tensor into one with a scaling of 1.

    The method's result has to be the base and an update that follows from the task vectors alone:
    it is called with a base of zeros, or is a mean of such. ``adapter_error``, the share of the
    update's norm that the adapter lacks, is added to the figures.
    """
    import torch

    from merging.ops.factored import factor_update
    from merging.ops.precision import float32_products

    device, dtype = adapters[0].up.device, adapters[0].up.dtype
    base = torch.zeros(task.shape, dtype=dtype, device=device)
    rows = task.shape[0]

    def expanded(adapter: Adapter) -> torch.Tensor:
        made = torch.zeros_like(base)
        adapter.write(made.view(rows, -1))
        return made

    experts: Iterator[Any] = iter(adapters)
    if not method.takes_adapters:
        experts, task = map(expanded, adapters), dataclasses.replace(task, ranks=())
    merged = method.merge(base if method.needs_base else None, experts, task)
    update, downs = merged.view(rows, -1), [adapter.down for adapter in adapters]
    if task.transposed:
        update, downs = update.t(), [adapter.up.t() for adapter in adapters]
    with float32_products(device):
        down, up, lacking = factor_update(update, torch.cat(downs), rank)
    task.figures["adapter_error"] = lacking
    if lacking > _TOLD:
        text = f"the adapter of rank {rank} lacks {lacking:.1%} of the update (by its norm)."
        task.figures.setdefault("warnings", []).append(text)
    return torch.cat([down.reshape(-1), up.reshape(-1)])
