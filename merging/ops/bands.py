"""Model Breadcrumbs' sparsifier: a band of magnitudes is kept.

Like those in :mod:`merging.ops.sparsify` it is the ``sparsify`` argument of
:func:`merging.ops.task_vectors.combine_task_vectors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch

from merging.ops.blocks import keep_where
from merging.ops.selection import Rank, Threshold
from merging.ops.sparsify import KeepFromThresholds, block_like, find_magnitudes


def band_ranks(density: float, gamma: float) -> tuple[Rank | None, Rank | None]:
    """Of so many entries, the rank of the last that is kept, and of the last that is dropped.

    A band has ``⌊density · N⌋`` entries: those that follow on the ``⌊γ · N⌋`` largest ones, of
    which fewer are dropped where density and γ add up to more than 1. A density of 1 has no band.
    """
    if density == 1:
        return None, None

    def dropped(size: int) -> int:
        return min(int(gamma * size), size - int(density * size))

    return lambda size: dropped(size) + int(density * size), dropped


class KeepBand:
    """Drops the largest entries of each task vector, and the smallest down to a density.

    Of equal magnitudes the lowest flat index counts as the largest.

    Args:
        thresholds: Of each expert, those of :func:`band_ranks`.
        like: As for :class:`~merging.ops.sparsify.KeepFromThresholds`.
        has_band: Whether an expert has one; else everything of it is kept.
    """

    def __init__(
        self,
        thresholds: Sequence[tuple[Threshold, Threshold]],
        like: torch.Tensor,
        has_band: Sequence[bool],
    ) -> None:
        self._thresholds = thresholds
        self._keep = KeepFromThresholds([upto for upto, _ in thresholds], like)
        self._drop = KeepFromThresholds([dropped for _, dropped in thresholds], like)
        self._has_band = has_band
        self._scratch = torch.empty_like(like)

    @classmethod
    def of_tensor(
        cls,
        base: torch.Tensor,
        experts: Sequence[torch.Tensor],
        densities: Sequence[float],
        gammas: Sequence[float],
    ) -> Self:
        """Of a tensor in memory.

        Args:
            base: Base tensor.
            experts: Tensors of the same shape.
            densities: Share to keep of each, in (0, 1].
            gammas: Share of largest entries to drop of each.
        """
        thresholds = []
        for expert, density, gamma in zip(experts, densities, gammas, strict=True):
            upto, dropped = find_magnitudes(base, expert, band_ranks(density, gamma))
            thresholds.append((upto, dropped))
        return cls(thresholds, block_like(base, experts), [density < 1 for density in densities])

    def afresh(self) -> Self:
        """The same for another pass over the tensors."""
        return type(self)(self._thresholds, self._scratch, self._has_band)

    def __call__(self, expert: int, task_vector_N: torch.Tensor, start: int) -> None:  # noqa: ARG002 - Sparsify
        """Zero the entries of a block that are not kept; blocks must come in order."""
        if self._has_band[expert]:
            magnitudes = torch.abs(task_vector_N, out=self._scratch[: task_vector_N.numel()])
            is_upto = self._keep.mark(expert, magnitudes)
            keep_where(task_vector_N, is_upto & ~self._drop.mark(expert, magnitudes))
