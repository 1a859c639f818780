"""Sparsifiers that look at ranks: a band of magnitudes, probabilities by rank, norms restored.

Like those in :mod:`merging.ops.sparsify` they are the ``sparsify`` argument of
:func:`merging.ops.task_vectors.combine_task_vectors`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from merging.ops.blocks import block_size, blocks_of, inner_product, work_dtype
from merging.ops.sparsify import KeepCounts, KeepRandom
from merging.ops.task_vectors import Sparsify, combine_task_vectors


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
        scratch_N: Flat tensor of the work dtype with as many entries; overwritten.
    """

    def __init__(
        self,
        base: torch.Tensor,
        experts: Sequence[torch.Tensor],
        densities: Sequence[float],
        gammas: Sequence[float],
        scratch_N: torch.Tensor,
    ) -> None:
        count = base.numel()
        upto, dropped = [], []
        for density, gamma in zip(densities, gammas, strict=True):
            kept = int(density * count)
            num_top = min(int(gamma * count), count - kept)
            upto.append(num_top + kept if density < 1 else count)
            dropped.append(num_top if density < 1 else 0)
        self._keep = KeepCounts(base, experts, upto, scratch_N)
        self._drop = KeepCounts(base, experts, dropped, scratch_N)

    def __call__(self, expert: int, task_vector_N: torch.Tensor, start: int) -> None:
        """Zero the entries of a block that are not kept; blocks must come in order."""
        largest_N = task_vector_N.clone()
        self._drop(expert, largest_N, start)
        self._keep(expert, task_vector_N, start)
        task_vector_N.sub_(largest_N)


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
        self._random = random
        self._probabilities: list[torch.Tensor | None] = []
        for expert, one in zip(experts, parameters, strict=True):
            density, epsilon = one.density, one.epsilon
            if density == 1:
                self._probabilities.append(None)
                continue
            magnitudes = (expert.to(torch.float32) - base.to(torch.float32)).abs_()
            order = magnitudes.argsort(dim=1, stable=True)
            last = magnitudes.shape[1] - 1
            ranks = torch.arange(last + 1, device=base.device, dtype=torch.float32)
            shares = ranks / last if last > 0 else ranks + 0.5
            by_rank = density - epsilon + 2 * epsilon * shares
            target = torch.empty_like(magnitudes)
            target.scatter_(1, order, by_rank.expand_as(magnitudes))
            self._probabilities.append(target.view(-1))

    def __call__(self, expert: int, task_vector_N: torch.Tensor, start: int) -> None:
        """Zero the entries of a block that are dropped."""
        probabilities = self._probabilities[expert]
        if probabilities is None:
            return
        block = probabilities[start : start + task_vector_N.numel()]
        uniform = self._random.uniform(expert, start, task_vector_N.numel())
        task_vector_N.mul_(uniform < block)


class RestoreNorms:
    """Sparsifies, then scales what is left of each task vector to the L1 norm that it had.

    Args:
        base: Base tensor.
        experts: Tensors of the same shape.
        new_sparsify: Makes the sparsifier, afresh for each pass over the tensors.
        like: A tensor of the work dtype.
    """

    def __init__(
        self,
        base: torch.Tensor,
        experts: Sequence[torch.Tensor],
        new_sparsify: Callable[[], Sparsify],
        like: torch.Tensor,
    ) -> None:
        sparsify, self._inner = new_sparsify(), new_sparsify()
        base_N = base.reshape(-1)
        size = min(block_size(base.device), base.numel())
        scratch = torch.empty((2, size), dtype=like.dtype, device=base.device)
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
    return inner_product(vector, vector.sign())


def merge_by_rank(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    parameters: Any,
    expert_parameters: Sequence[Any],
    *,
    seed: int,
    tensor_name: str,
    elect_signs: bool,
) -> torch.Tensor:
    """Merge one tensor by DELLA: with :class:`KeepByRank`, row by row.

    Args:
        base: Base tensor; a vector is one row.
        experts: Tensors of the same shape.
        parameters: ``scale``, ``normalize`` and ``rescale``.
        expert_parameters: ``density``, ``epsilon`` and ``weight`` of each.
        seed: The recipe's seed.
        tensor_name: Name of the tensor.
        elect_signs: As for :func:`~merging.ops.task_vectors.combine_task_vectors`.
    """
    merged_N = torch.empty(base.numel(), dtype=work_dtype((base, *experts)), device=base.device)
    rows = [t.reshape(1, -1) if t.ndim < 2 else t.flatten(1) for t in (base, *experts)]

    random = KeepRandom(
        [one.density for one in expert_parameters],
        rescale=False,
        seed=seed,
        tensor_name=tensor_name,
        offset=0,
        device=base.device,
    )
    keep = KeepByRank(rows[0], rows[1:], expert_parameters, random)
    is_scaled = parameters.rescale
    return combine_task_vectors(
        base,
        experts,
        [one.weight for one in expert_parameters],
        scale=parameters.scale,
        normalize=parameters.normalize,
        elect_signs=elect_signs,
        sparsify=RestoreNorms(base, experts, lambda: keep, merged_N) if is_scaled else keep,
        out=merged_N,
    )
