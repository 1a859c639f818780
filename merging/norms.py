"""Norms of task vectors that a method restores, of a tensor that is worked on in tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from merging.method import Cost, Geometry, Reduction, Task
from merging.sums import sum_of_tiles

if TYPE_CHECKING:
    import torch

    from merging.ops.norms import Norms
    from merging.ops.task_vectors import Sparsify


def norms_pass(
    measure: Callable[[torch.Tensor, Sequence[torch.Tensor], Task], Sequence[Norms]],
    cost: Callable[[Geometry, Any], Cost],
    *,
    by_row: bool = False,
) -> Reduction:
    """Finds the norms of task vectors before and after they are thinned out.

    Args:
        measure: Does so of a tile, for each expert.
        cost: Of that.
        by_row: Tiles are whole rows.
    """

    def terms(
        base: torch.Tensor, experts: list[torch.Tensor], task: Task
    ) -> Iterator[Sequence[float]]:
        for norms in measure(base, experts, task):
            yield from norms

    return sum_of_tiles(
        "norms",
        terms,
        sums_per_expert=2,
        cost=cost,
        needed=lambda parameters: parameters.rescale,
        by_row=by_row,
    )


def with_known_norms(keep: Sparsify, task: Task) -> Sparsify:
    """What restores norms that the pass has found, if they are restored."""
    from merging.ops.norms import RestoreNorms, factors_from_sums

    if not task.parameters.rescale:
        return keep
    return RestoreNorms(keep, factors_from_sums(task.given[-1].tolist()))
