"""DELLA's sparsifier: entries are kept at random, the larger ones of a row more likely.

Shapes: R rows of C entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from merging.ops.blocks import as_array, block_size, keep_where
from merging.ops.masks import Mask
from merging.ops.norms import Norms, norms_of_rows
from merging.ops.sparsify import KeepRandom

_LEAST, _MOST = -(2**31), 2**31 - 1
"""Below and beyond all keys."""


_MOST_IN_FLOAT32 = 1 << 15
"""Columns whose numbers have bits to spare in float32."""


class KeepByRank:
    """Keeps entries at random, the larger ones of a row more likely (MAGPRUNE).

    In each row, probabilities rise with the rank of the magnitude from density − ε to density + ε
    in equal steps; equal magnitudes have the mean of the probabilities of their ranks. Random bits
    are those of :class:`~merging.ops.sparsify.KeepRandom`.

    An entry is kept if its random number is below the probability of its rank: that is, if its
    rank is not below the first one whose probability is above the random number. So rows are
    sorted, but no entry's own rank has to be known: its magnitude is compared with the one at that
    rank. Where these are equal a random bit decides.

    Args:
        base: The base tensor, or whole rows of it, R×C.
        experts: Tensors of the same shape.
        parameters: Of each expert: ``density``, the mean probability, in (0, 1], where 1 keeps
            everything; ``epsilon``, half the spread of probabilities.
        random: Source of bits.
        offset: Flat index, in the whole tensor, of the first entry.

    Attributes:
        norms: Of the rows of each task vector; none of a density of 1.
    """

    def __init__(
        self,
        base: torch.Tensor,
        experts: Sequence[torch.Tensor],
        parameters: Sequence[Any],
        random: KeepRandom,
        offset: int,
    ) -> None:
        self._random = random
        self._offset = offset
        self._kept: list[Mask | None] = []
        self.norms: list[Norms] = []
        for number, (expert, one) in enumerate(zip(experts, parameters, strict=True)):
            self.norms.append(Norms([], []))
            self._kept.append(self._draw(base, expert, number, one) if one.density < 1 else None)

    def __call__(self, expert: int, task_vector_N: torch.Tensor, start: int) -> None:
        """Zero the entries of a block that are dropped."""
        mask = self._kept[expert]
        if mask is not None:
            keep_where(task_vector_N, mask.read(start, task_vector_N.numel()))

    def _draw(self, base: torch.Tensor, expert: torch.Tensor, number: int, parameters: Any) -> Mask:
        """Decide about all entries of an expert, some rows at a time."""
        columns = base.shape[1]
        mask = Mask(base.numel(), base.device)
        for rows in _groups(base):
            origin = base[rows].to(torch.float32)
            magnitudes = expert[rows].to(torch.float32, copy=True).sub_(origin).abs_()
            first = rows.start * columns
            uniform = self._random.uniform_int32(number, self._offset + first, origin.numel())
            uniform = uniform.view_as(magnitudes)
            keys = _keys(magnitudes)
            needed = _needed(keys, uniform, parameters)
            is_kept = as_array(keys.add_(uniform.bitwise_and_(1))) >= as_array(needed)
            mask.write(first, is_kept.reshape(-1))
            self.norms[number].before.extend(norms_of_rows(magnitudes))
            keep_where(magnitudes, is_kept)
            self.norms[number].after.extend(norms_of_rows(magnitudes))
        return mask


def _groups(base: torch.Tensor) -> Iterator[slice]:
    """Rows that are worked on together: a block of them, in whole bytes of a mask if it can be."""
    rows, columns = base.shape
    even = 8 // math.gcd(8, columns)
    size = max(1, block_size(base.device) // max(1, columns) // even) * even
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def _keys(magnitudes: torch.Tensor) -> torch.Tensor:
    """Even whole numbers in the order of the magnitudes: their bit patterns, doubled."""
    doubled = magnitudes.view(torch.int32).bitwise_left_shift(1)
    return doubled.bitwise_xor_(_LEAST)  # unsigned order as signed


def _needed(keys: torch.Tensor, uniform: torch.Tensor, parameters: Any) -> torch.Tensor:
    """What the key of an entry, made odd at random, has to reach for the entry to be kept.

    Args:
        keys: R×C.
        uniform: int32, random.
        parameters: ``density`` and ``epsilon``.

    Returns:
        R×C: the key at the first rank whose probability is above the random number; one more
        unless it is the first of equal ones, all of which have that rank or a higher one. So they
        are kept as often as if their order were random.
    """
    rows, columns = keys.shape
    ladder = torch.empty((rows, columns + 1), dtype=torch.int32, device=keys.device)
    ordered = ladder[:, :columns]
    if keys.device.type == "cpu":
        ordered.copy_(keys).numpy().sort(axis=1)  # NumPy is many times as fast
    else:
        ordered.copy_(keys.sort(dim=1).values)
    is_equal = as_array(ordered[:, 1:]) == as_array(ordered[:, :-1])
    later = as_array(ordered[:, 1:])
    later += is_equal
    ladder[:, 0], ladder[:, columns] = _LEAST, _MOST  # any rank will do; none will
    # A number u is below the probability of rank r where r > (u - lowest) (C - 1) / (2 epsilon).
    spread = 2.0 * parameters.epsilon * 2.0**32 if columns > 1 else 0.0
    steps = max(columns - 1, 1) / max(spread, 1.0)
    lowest = (parameters.density - 0.5) * 2.0**32 - spread / 2
    # In float32 an error of at most 2⁻⁸ of a rank moves probabilities by less than a step of them.
    dtype = torch.float32 if columns <= _MOST_IN_FLOAT32 else torch.float64
    ranks = uniform.to(dtype).mul_(steps).add_(1 - lowest * steps)
    return ladder.gather(1, ranks.clamp_(0, columns).to(torch.int64))
