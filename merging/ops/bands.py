"""Sparsifiers that look at ranks: a band of magnitudes, probabilities by rank, norms restored.

Like those in :mod:`merging.ops.sparsify` they are the ``sparsify`` argument of
:func:`merging.ops.task_vectors.combine_task_vectors`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from merging.ops.blocks import block_size, blocks_of, keep_where, work_dtype
from merging.ops.sparsify import KeepCounts, KeepRandom
from merging.ops.task_vectors import Sparsify


class KeepBand:
    """Drops the largest entries of each task vector, and the smallest down to a density.

    Keeps ``⌊density · N⌋`` entries: those that follow on the ``⌊γ · N⌋`` largest ones, of which
    fewer are dropped where density and γ add up to more than 1. A density of 1 keeps everything. Of
    equal magnitudes the lowest flat index counts as the largest.

    Args:
        base: Base tensor.
        experts: Tensors of the same shape.
        densities: Share to keep of each, in (0, 1].
        gammas: Share of largest entries to drop of each.
    """

    def __init__(
        self,
        base: torch.Tensor,
        experts: Sequence[torch.Tensor],
        densities: Sequence[float],
        gammas: Sequence[float],
    ) -> None:
        count = base.numel()
        upto, dropped = [], []
        for density, gamma in zip(densities, gammas, strict=True):
            kept = int(density * count)
            num_top = min(int(gamma * count), count - kept)
            upto.append(num_top + kept if density < 1 else count)
            dropped.append(num_top if density < 1 else 0)
        self._densities = densities
        self._keep = KeepCounts(base, experts, upto)
        self._drop = KeepCounts(base, experts, dropped)
        size = min(block_size(base.device), count)
        dtype = work_dtype((base, *experts))
        self._scratch = torch.empty((3, size), dtype=dtype, device=base.device)

    def __call__(self, expert: int, task_vector_N: torch.Tensor, start: int) -> None:  # noqa: ARG002 - Sparsify
        """Zero the entries of a block that are not kept; blocks must come in order."""
        if self._densities[expert] == 1:
            return
        magnitudes, kept, dropped = self._scratch[:, : task_vector_N.numel()]
        torch.abs(task_vector_N, out=magnitudes)
        self._keep.mark(expert, magnitudes, kept)
        task_vector_N.mul_(kept.sub_(self._drop.mark(expert, magnitudes, dropped)))


class KeepByRank:
    """Keeps entries at random, the larger ones of a row more likely (DELLA's MAGPRUNE).

    In each row, probabilities rise with the rank of the magnitude from density − ε to density + ε
    in equal steps. Random bits are those of :class:`~merging.ops.sparsify.KeepRandom`.

    Args:
        base: The base tensor, R×C.
        experts: Tensors of the same shape.
        parameters: Of each expert: ``density``, the mean probability, in (0, 1], where 1 keeps
            everything; ``epsilon``, half the spread of probabilities.
        random: Source of bits.
    """

    def __init__(
        self,
        base: torch.Tensor,
        experts: Sequence[torch.Tensor],
        parameters: Sequence[Any],
        random: KeepRandom,
    ) -> None:
        self._kept: list[torch.Tensor | None] = []
        for number, (expert, one) in enumerate(zip(experts, parameters, strict=True)):
            is_kept = None
            if one.density < 1:
                is_kept = torch.empty(base.numel(), dtype=torch.bool, device=base.device)
                self._draw(is_kept.view(base.shape), base, expert, number, one, random)
            self._kept.append(is_kept)

    def __call__(self, expert: int, task_vector_N: torch.Tensor, start: int) -> None:
        """Zero the entries of a block that are dropped."""
        is_kept = self._kept[expert]
        if is_kept is not None:
            keep_where(task_vector_N, is_kept[start : start + task_vector_N.numel()])

    def _draw(
        self,
        is_kept: torch.Tensor,
        base: torch.Tensor,
        expert: torch.Tensor,
        number: int,
        parameters: Any,
        random: KeepRandom,
    ) -> None:
        """Decide about all entries of an expert, some rows at a time."""
        columns = base.shape[1]
        limits = _limits(columns, parameters.density, parameters.epsilon, base.device)
        num_rows = max(1, block_size(base.device) // max(1, columns))
        for first in range(0, base.shape[0], num_rows):
            rows = slice(first, first + num_rows)
            magnitudes = (expert[rows].to(torch.float32) - base[rows].to(torch.float32)).abs_()
            limit = torch.empty(magnitudes.shape, dtype=torch.int32, device=base.device)
            limit.scatter_(1, _ascending(magnitudes), limits.expand_as(limit))
            target, limit = is_kept[rows].view(-1), limit.view(-1)
            for block in blocks_of(limit.numel(), base.device):
                uniform = random.uniform_int32(
                    number, first * columns + block.start, block.stop - block.start
                )
                target[block] = uniform < limit[block]


def _limits(columns: int, density: float, epsilon: float, device: torch.device) -> torch.Tensor:
    """Probabilities by rank, as what uniform 32-bit integers have to be below."""
    last = columns - 1
    ranks = torch.arange(columns, device=device, dtype=torch.float32)
    shares = ranks / last if last > 0 else ranks + 0.5
    probabilities = density - epsilon + 2 * epsilon * shares
    return probabilities.double().sub_(0.5).mul_(2.0**32).ceil_().to(torch.int32)


def _ascending(magnitudes: torch.Tensor) -> torch.Tensor:
    """The order of each row's entries, equal ones by their index.

    On a CPU, NumPy sorts whole numbers seven times as fast as torch sorts with indices: those of
    the bit patterns, which grow with the magnitudes, and the column in the lower half.
    """
    if magnitudes.device.type != "cpu":
        return magnitudes.argsort(dim=1, stable=True)
    columns = torch.arange(magnitudes.shape[1])
    keys = magnitudes.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(columns)
    keys.numpy().sort(axis=1)
    return keys.bitwise_and_(2**32 - 1)


class RestoreNorms:
    """Sparsifies, then scales what is left of each task vector to the L1 norm that it had.

    Args:
        base: Base tensor.
        experts: Tensors of the same shape.
        new_sparsify: Makes the sparsifier, afresh for each pass over the tensors.
        dtype: To compute in.
    """

    def __init__(
        self,
        base: torch.Tensor,
        experts: Sequence[torch.Tensor],
        new_sparsify: Callable[[], Sparsify],
        dtype: torch.dtype,
    ) -> None:
        sparsify, self._inner = new_sparsify(), new_sparsify()
        base_N = base.reshape(-1)
        size = min(block_size(base.device), base.numel())
        scratch = torch.empty((2, size), dtype=dtype, device=base.device)
        self._factors: list[float] = []
        for number, expert in enumerate(experts):
            expert_N = expert.reshape(-1)
            before = after = 0.0
            for block in blocks_of(base.numel(), base.device):
                vector, origin = scratch[:, : base_N[block].numel()]
                vector.copy_(expert_N[block]).sub_(origin.copy_(base_N[block]))
                before += _l1_norm(vector)
                sparsify(number, vector, block.start)
                after += _l1_norm(vector)
            self._factors.append(before / after if after else 1.0)

    def __call__(self, expert: int, task_vector_N: torch.Tensor, start: int) -> None:
        """Zero the entries of a block that are not kept, and scale the others."""
        self._inner(expert, task_vector_N, start)
        task_vector_N.mul_(self._factors[expert])


def _l1_norm(vector: torch.Tensor) -> float:
    """In float64."""
    return float(vector.double().abs_().sum())
