"""Exact sums over a tensor that is worked on in tiles, by a pass of their own over it.

The terms are those of blocks or rows, the same however the tensor is cut, and the sums are those of
whole numbers (:mod:`merging.ops.exact_sums`): a method that sums up in memory gets the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from merging.method import Cost, Geometry, Reduction, Step, Task
from merging.ops.exact_sums import SUM_WORDS, from_words, to_words

if TYPE_CHECKING:
    import torch

Terms = Callable[["torch.Tensor", "list[torch.Tensor]", Task], Iterable[Iterable[float]]]
"""From what the method gets, of a tile: the terms of each sum; not negative."""


def sum_of_tiles(
    name: str,
    terms: Terms,
    *,
    sums_per_expert: int,
    cost: Callable[[Geometry, Any], Cost],
    needed: Callable[[Any], bool],
    by_row: bool = False,
) -> Reduction:
    """The pass; its result are the sums in float64, flat.

    Args:
        name: Of its intermediate files.
        terms: See :data:`Terms`.
        sums_per_expert: How many sums there are, by the number of experts.
        cost: Of finding the terms of a tile.
        needed: Whether the sums are, with these parameters.
        by_row: Tiles are whole rows.
    """

    def count(base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task) -> Any:
        import torch

        assert base is not None
        words = [to_words(numbers) for numbers in terms(base, list(experts), task)]
        return torch.tensor(words, dtype=torch.int64, device=base.device).view(-1)

    return Reduction(
        name=name,
        map=Step(merge=count, cost=cost, separable="sum", by_row=by_row),
        entries=lambda g, _: sums_per_expert * g.num_experts * SUM_WORDS,
        dtype="I64",
        combine=Step(merge=_read, cost=_read_cost, separable="whole", streaming=True, flat=True),
        combined_entries=lambda num_experts: sums_per_expert * num_experts,
        combined_dtype="F64",
        needed=needed,
    )


def _read(_: torch.Tensor | None, words: Iterator[torch.Tensor], __: Task) -> torch.Tensor:
    """The sums that the words of one tensor stand for."""
    import torch

    [found] = words
    sums = [from_words(one) for one in found.cpu().view(-1, SUM_WORDS).tolist()]
    return torch.tensor(sums, dtype=torch.float64)


def _read_cost(geometry: Geometry, _: Any) -> Cost:
    return Cost(float(geometry.num_entries), 8 * geometry.num_entries)
