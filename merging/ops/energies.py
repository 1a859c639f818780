"""SCE's three steps: select by variance, weigh by energy, average what agrees with a sign."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from merging.ops.blocks import (
    TILE_MULTIPLE,
    as_array,
    block_size,
    blocks_of,
    keep_where,
    positions_of,
    result_for,
    rounded_blocks,
    work_dtype,
)
from merging.ops.masks import Mask
from merging.ops.selection import Rank, Threshold, find_thresholds, sample_of
from merging.ops.sparsify import KeepFromThresholds

_NO_ENERGY = 1e-6


def share_of_differing(share: float) -> Rank:
    """The last of so large a share of the variances that are not 0."""
    return lambda size: int(share * size)


def find_variance(base: torch.Tensor, experts: Sequence[torch.Tensor], share: float) -> Threshold:
    """The threshold of the largest variances of a tensor's entries.

    Args:
        base: Base tensor.
        experts: Tensors of the same shape.
        share: Of the entries whose variance is not 0, to be selected.
    """

    def blocks() -> Iterator[torch.Tensor]:
        vectors = TaskVectors(base, experts)
        for part in vectors.parts():
            yield part.variances()

    sampled = [sample_of(tensor.reshape(-1)) for tensor in (base, *experts)]
    count = sampled[0].numel()
    sample = TaskVectors(sampled[0], sampled[1:], size=count).variances_above_0(slice(0, count))
    is_whole = count == base.numel()
    rank = share_of_differing(share)
    [found] = find_thresholds(blocks, sample, [rank], is_whole=is_whole, skips_zeros=True)
    return found


def measure_energies(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    keep: KeepFromThresholds | None,
    mask: Mask | None = None,
) -> list[list[float]]:
    """Sums of squares of each task vector's selected entries, of parts of a tensor or a tile.

    Args:
        base: Base tensor, or a tile of it.
        experts: Tensors of the same shape.
        keep: Says which entries are selected, by their variance; all if left out.
        mask: Is told which these are.
    """
    energies: list[list[float]] = [[] for _ in experts]
    for part in TaskVectors(base, experts).parts():
        for own, vector in zip(energies, part.select(keep, mask), strict=True):
            for block in vector.split(TILE_MULTIPLE):
                doubles = block.to(torch.float64)
                own.append(float(torch.dot(doubles, doubles)))
    return energies


def weights_of(energies: Sequence[float], num_entries: int) -> list[float]:
    """Each expert's share in the energy of what is selected.

    Args:
        energies: Sums of squares of the experts.
        num_entries: Of the tensor.
    """
    means = [energy / max(1, num_entries) for energy in energies]
    total = sum(means)
    if total < _NO_ENERGY:
        return [1 / len(means)] * len(means)
    return [mean / total for mean in means]


def merge_by_energy(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    keep: KeepFromThresholds | Mask | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Merge a tensor, or the next tile of one.

    Args:
        base: Base tensor, any float dtype.
        experts: Tensors of the same shape.
        weights: Of the experts.
        keep: As in :func:`measure_energies`, or what that has told.
        out: Flat, of any float dtype, for the result; by default new, float32 (float64 if an input
            is).

    Returns:
        Tensor of the base's shape.
    """
    dtype = work_dtype((base, *experts))
    merged_N = result_for(base, dtype, out)
    parts = TaskVectors(base, experts).parts()
    for part, (_, total) in zip(parts, rounded_blocks(merged_N, dtype), strict=True):
        _average_agreeing(total, part.select(keep), weights, part.spare)
        total.add_(part.origin)
    return merged_N.view(base.shape)


_Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _Part(NamedTuple):
    """A block of the base and of all task vectors, three buffers of its length, and its place."""

    start: int
    origin: torch.Tensor
    vectors: list[torch.Tensor]
    spare: _Three
    variance: torch.Tensor

    def variances(self) -> torch.Tensor:
        """Over the task vectors, entry by entry.

        By Welford's recurrence, which gives exactly 0 where all are equal. torch's own function
        goes through entries one by one, which takes fifty times as long.
        """
        mean, difference, shift = self.spare
        first, *others = self.vectors
        if not others:
            return self.variance.zero_()
        for number, vector in enumerate(others, 2):
            last = first if number == 2 else mean
            torch.sub(vector, last, out=difference)
            torch.add(last, torch.div(difference, number, out=shift), out=mean)
            torch.sub(vector, mean, out=shift)
            if number == 2:
                torch.mul(shift, difference, out=self.variance)
            else:
                self.variance.add_(shift.mul_(difference))
        return self.variance.div_(len(self.vectors))

    def select(
        self, keep: KeepFromThresholds | Mask | None, mask: Mask | None = None
    ) -> list[torch.Tensor]:
        """The task vectors, with entries that are not selected made 0; a mask is told which."""
        if keep is None:
            return self.vectors
        if isinstance(keep, Mask):
            is_selected = keep.read(self.start, self.origin.numel())
        else:
            is_selected = keep.mark(0, self.variances())
            if mask is not None:
                mask.write(self.start, is_selected)
        for vector in self.vectors:
            keep_where(vector, is_selected)
        return self.vectors


class TaskVectors:
    """Task vectors of experts, made in blocks as often as they are looked at.

    Args:
        base: Base tensor.
        experts: Tensors of the same shape.
        size: Of the longest block, if it is another one than usual.
    """

    def __init__(
        self, base: torch.Tensor, experts: Sequence[torch.Tensor], *, size: int | None = None
    ) -> None:
        self._base_N = base.reshape(-1)
        self._experts_N = [expert.reshape(-1) for expert in experts]
        size = min(block_size(base.device), base.numel()) if size is None else size
        dtype = work_dtype((base, *experts))
        self._scratch = torch.empty((5 + len(experts), size), dtype=dtype, device=base.device)

    def parts(self) -> Iterator[_Part]:
        """All blocks in order; see :meth:`at`."""
        return map(self.at, blocks_of(self._base_N.numel(), self._base_N.device))

    def at(self, block: slice) -> _Part:
        """A block, in memory that the next one uses again."""
        buffers = self._scratch[:, : block.stop - block.start]
        first, second, third, variance, origin, *vectors = buffers
        origin.copy_(self._base_N[block])
        for vector, expert_N in zip(vectors, self._experts_N, strict=True):
            vector.copy_(expert_N[block]).sub_(origin)
        return _Part(block.start, origin, vectors, (first, second, third), variance)

    def variances_above_0(self, block: slice) -> torch.Tensor:
        """The variances of a block's entries without those that are 0, until the next block."""
        variances = self.at(block).variances()
        is_above = as_array(variances) != 0
        above = as_array(variances)[positions_of(is_above)]
        return torch.from_numpy(above) if isinstance(above, np.ndarray) else above


def _average_agreeing(
    total: torch.Tensor, vectors: Sequence[torch.Tensor], weights: Sequence[float], spare: _Three
) -> None:
    """Write the weighted mean of the entries whose sign is that of the sum; these are used up."""
    signs, divisor, share = spare
    signs.zero_()
    for vector in vectors:
        signs.add_(vector)
    signs.ge_(0).mul_(2).sub_(1)
    total.zero_()
    divisor.zero_()
    for vector, weight in zip(vectors, weights, strict=True):
        share.copy_(vector).sign_().eq_(signs).mul_(weight)
        divisor.add_(share)
        total.add_(vector.mul_(share))
    total.div_(divisor.clamp_(min=_NO_ENERGY))
