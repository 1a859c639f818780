"""SCE's three steps: select by variance, weigh by energy, average what agrees with a sign."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from merging.ops.blocks import (
    block_size,
    blocks_of,
    inner_product,
    result_for,
    rounded_blocks,
    work_dtype,
)
from merging.ops.selection import kth_largest, sample_of
from merging.ops.sparsify import KeepFromThresholds

_NO_ENERGY = 1e-6


def merge_by_energy(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    share: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[float]]:
    """Merge one tensor.

    Args:
        base: Base tensor, any float dtype.
        experts: Tensors of the same shape.
        share: Of the entries whose variance is not 0, to be selected.
        out: Flat, of any float dtype, for the result; by default new, float32 (float64 if an input
            is).

    Returns:
        Tensor of that shape, and the experts' weights.
    """
    vectors = _Vectors(base, experts)
    vectors.select(share)
    weights = vectors.weights()
    merged_N = result_for(base, vectors.dtype, out)
    blocks = zip(vectors.selected(), rounded_blocks(merged_N, vectors.dtype), strict=True)
    for (_, origin, parts), (_, total) in blocks:
        _average_agreeing(total, parts, weights)
        total.add_(origin)
    return merged_N.view(base.shape), weights


def _average_agreeing(
    total: torch.Tensor, vectors: Sequence[torch.Tensor], weights: Sequence[float]
) -> None:
    """Write the weighted mean of the entries whose sign is that of the sum; these are used up."""
    signs = torch.zeros_like(total)
    for vector in vectors:
        signs.add_(vector)
    signs.ge_(0).mul_(2).sub_(1)
    total.zero_()
    divisor, share = torch.zeros_like(total), torch.empty_like(total)
    for vector, weight in zip(vectors, weights, strict=True):
        share.copy_(vector).sign_().eq_(signs).mul_(weight)
        divisor.add_(share)
        total.add_(vector.mul_(share))
    total.div_(divisor.clamp_(min=_NO_ENERGY))


_Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _Vectors:
    """Task vectors of experts, made in blocks as often as they are looked at.

    Attributes:
        dtype: To compute in.
    """

    def __init__(self, base: torch.Tensor, experts: Sequence[torch.Tensor]) -> None:
        self.dtype = work_dtype((base, *experts))
        self._base_N = base.reshape(-1)
        self._experts_N = [expert.reshape(-1) for expert in experts]
        size = min(block_size(base.device), base.numel())
        self._scratch = torch.empty((4 + len(experts), size), dtype=self.dtype, device=base.device)
        self._variances_N = torch.empty(0, dtype=self.dtype, device=base.device)
        self._threshold, self._ties = 0.0, 0

    def select(self, share: float) -> None:
        """Choose the entries of largest variance; all are chosen before."""
        num_entries = self._base_N.numel()
        if share == 1 or not num_entries:
            return
        variances_N = self._variances_N = self._variances_N.new_empty(num_entries)
        for block, _, parts, spare in self._blocks():
            _write_variance(variances_N[block], parts, *spare)
        blocks = variances_N.split(block_size(variances_N.device))
        count = int(share * sum(int(block.count_nonzero()) for block in blocks))
        if not count:
            self._threshold = float("inf")
            return
        sample = sample_of(variances_N)
        self._threshold, above = kth_largest(lambda: iter(blocks), sample, num_entries, count)
        self._ties = count - above

    def weights(self) -> list[float]:
        """Of each expert: its share in the energy of what is selected."""
        energies = [0.0] * len(self._experts_N)
        for _, _, parts in self.selected():
            for number, part in enumerate(parts):
                energies[number] += inner_product(part, part) / self._base_N.numel()
        total = sum(energies)
        if total < _NO_ENERGY:
            return [1 / len(energies)] * len(energies)
        return [energy / total for energy in energies]

    def selected(self) -> Iterator[tuple[slice, torch.Tensor, list[torch.Tensor]]]:
        """Blocks of the base and of task vectors, with entries that are not selected made 0."""
        keep = KeepFromThresholds([self._threshold], [self._ties], self._scratch[0])
        for block, origin, parts, (mask, *_) in self._blocks():
            if self._threshold:
                keep.mark(0, self._variances_N[block], mask)
                for part in parts:
                    part.mul_(mask)
            yield block, origin, parts

    def _blocks(
        self,
    ) -> Iterator[tuple[slice, torch.Tensor, list[torch.Tensor], _Three]]:
        """Where a block is, the base's and the task vectors', and three buffers of its length."""
        for block in blocks_of(self._base_N.numel(), self._base_N.device):
            first, second, third, origin, *parts = self._scratch[:, : block.stop - block.start]
            origin.copy_(self._base_N[block])
            for part, expert_N in zip(parts, self._experts_N, strict=True):
                part.copy_(expert_N[block]).sub_(origin)
            yield block, origin, parts, (first, second, third)


def _write_variance(
    variance: torch.Tensor,
    vectors: Sequence[torch.Tensor],
    mean: torch.Tensor,
    difference: torch.Tensor,
    shift: torch.Tensor,
) -> None:
    """Variance over vectors, entry by entry; those are used up.

    By Welford's recurrence, which gives exactly 0 where all are equal. torch's own function goes
    through entries one by one, which takes fifty times as long.
    """
    mean.copy_(vectors[0])
    variance.zero_()
    for number, vector in enumerate(vectors[1:], 2):
        torch.sub(vector, mean, out=difference)
        mean.add_(torch.div(difference, number, out=shift))
        variance.add_(vector.sub_(mean).mul_(difference))
    variance.div_(len(vectors))
