"""L1 norms of task vectors before and after they are thinned out, to be restored.

Norms are sums of the norms of parts, blocks of a tensor or rows: these are the same however a
tensor is cut into tiles, and so are their exact sums (:mod:`merging.ops.exact_sums`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch

from merging.ops.blocks import TILE_MULTIPLE, blocks_of
from merging.ops.exact_sums import exact_sum
from merging.ops.sparsify import block_like
from merging.ops.task_vectors import Sparsify


class Norms(NamedTuple):
    """L1 norms of the parts of a task vector, with all entries and with those that are kept."""

    before: list[float]
    after: list[float]


class RestoreNorms:
    """Sparsifies, then scales what is left of each task vector to the L1 norm that it had.

    Args:
        sparsify: Zeroes entries.
        factors: What each task vector is multiplied with.
    """

    def __init__(self, sparsify: Sparsify, factors: Sequence[float]) -> None:
        self._sparsify = sparsify
        self._factors = factors

    def __call__(self, expert: int, task_vector_N: torch.Tensor, start: int) -> None:
        """Zero the entries of a block that are not kept, and scale the others."""
        self._sparsify(expert, task_vector_N, start)
        task_vector_N.mul_(self._factors[expert])


def measure_norms(
    base: torch.Tensor, experts: Sequence[torch.Tensor], sparsify: Sparsify
) -> list[Norms]:
    """Norms of the task vectors of a tensor or tile, block by block.

    Args:
        base: Base tensor.
        experts: Tensors of the same shape.
        sparsify: To be used for this alone.
    """
    base_N = base.reshape(-1)
    like = block_like(base, experts)
    vector, origin = torch.empty_like(like), torch.empty_like(like)
    norms = []
    for number, expert in enumerate(experts):
        expert_N = expert.reshape(-1)
        found = Norms([], [])
        for block in blocks_of(base.numel(), base.device):
            size = block.stop - block.start
            T = vector[:size].copy_(expert_N[block]).sub_(origin[:size].copy_(base_N[block]))
            found.before.extend(_norms_of_parts(T))
            sparsify(number, T, block.start)
            found.after.extend(_norms_of_parts(T))
        norms.append(found)
    return norms


def norms_of_rows(magnitudes_RC: torch.Tensor) -> list[float]:
    """Sums of rows, of which each depends on that row alone: NumPy adds by pairs."""
    if magnitudes_RC.device.type == "cpu":
        return cast("list[float]", np.add.reduce(magnitudes_RC.numpy(), axis=1).tolist())
    return cast("list[float]", magnitudes_RC.sum(1, dtype=torch.float64).tolist())


def _norms_of_parts(T: torch.Tensor) -> list[float]:
    magnitudes = T.abs()
    return [norms_of_rows(part.view(1, -1))[0] for part in magnitudes.split(TILE_MULTIPLE)]


def factors_of(norms: Sequence[Norms]) -> list[float]:
    """What restores norms."""
    sums = [exact_sum(parts) for one in norms for parts in one]
    return factors_from_sums(sums)


def factors_from_sums(sums: Sequence[float]) -> list[float]:
    """The same from sums before and after, expert by expert; 1 where nothing is left."""
    pairs = zip(sums[::2], sums[1::2], strict=True)
    return [before / after if after else 1.0 for before, after in pairs]
