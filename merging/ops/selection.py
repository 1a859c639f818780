"""The exact k-th largest of many values without sorting them, or holding all of them.

The values come in blocks, as often as they are asked for. A sample says between which two bounds
the k-th largest lies, almost surely; one pass then counts what is beyond these and keeps what is
between them, a few in a hundred, among which a selection finds it. Often a bound is the answer: of
the differences of bfloat16 weights a great many are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

_SAMPLE = 1 << 16
"""Values in a sample, at least; about 2 in 100 of all values then lie between the bounds."""

_DEVIATIONS = 6
"""Standard deviations of a sampled rank that the bounds are apart from it."""

Blocks = Callable[[], Iterator[torch.Tensor]]
"""A pass over non-negative values, in blocks of which each may only be used until the next."""


def sample_of(values_N: torch.Tensor) -> torch.Tensor:
    """Evenly spread entries of a flat tensor; an odd distance leaves no column out."""
    return values_N[:: values_N.numel() // (2 * _SAMPLE) | 1]


def kth_largest(
    blocks: Blocks, sample: torch.Tensor, num_entries: int, k: int
) -> tuple[float, int]:
    """The exact k-th largest value, and how many are larger. NaN counts as largest.

    Args:
        blocks: Passes over all values.
        sample: Those of them that :func:`sample_of` chooses.
        num_entries: How many there are.
        k: From 1 to ``num_entries``.
    """
    if sample.numel() == num_entries:
        return select_largest(sample, k)
    low, high = _bounds(sample, k / num_entries)
    while True:
        found = _look(blocks, low, high)
        above, from_high = num_entries - found.upto_high, num_entries - found.below_high
        if k <= above and high < math.inf:  # the sample misled us
            low, high = high, math.inf
        elif k <= from_high:
            return high, above
        elif k <= num_entries - found.upto_low:
            value, above = select_largest(torch.cat(found.between), k - from_high)
            return value, from_high + above
        elif k <= num_entries - found.below_low:
            return low, num_entries - found.upto_low
        else:
            low, high = -1.0, low


class _Found(NamedTuple):
    """How many values are where, and those between two bounds."""

    upto_high: int
    below_high: int
    upto_low: int
    below_low: int
    between: list[torch.Tensor]


def _bounds(sample: torch.Tensor, share: float) -> tuple[float, float]:
    """Values between which the one lies, almost surely, that a share of all is not below."""
    # NumPy sorts values alone, twenty times as fast as torch with their indices. NaN is last.
    ascending = np.sort(sample.cpu().numpy())
    count = ascending.size
    rank, margin = share * count, _DEVIATIONS * math.sqrt(share * (1 - share) * count) + 1
    first, last = math.floor(rank - margin), math.ceil(rank + margin)
    high = float(ascending[count - 1 - first]) if first >= 0 else math.inf
    return float(ascending[count - 1 - last]) if last < count else -1.0, high


def _look(blocks: Blocks, low: float, high: float) -> _Found:
    counts = [0, 0, 0, 0]
    between = []
    for block in blocks():
        # NumPy compares, counts and picks several times as fast as torch on a CPU.
        is_host = block.device.type == "cpu"
        values: Any = block.numpy() if is_host else block
        masks = [values <= high, values < high, values <= low, values < low]
        for number, mask in enumerate(masks):
            counts[number] += int(np.count_nonzero(mask) if is_host else mask.sum())
        inside = masks[1] > masks[2]
        picked = values[np.flatnonzero(inside) if is_host else inside]
        between.append(torch.from_numpy(picked) if is_host else picked)
    upto_high, below_high, upto_low, below_low = counts
    return _Found(upto_high, below_high, upto_low, below_low, between)


def select_largest(values: torch.Tensor, k: int) -> tuple[float, int]:
    """The exact k-th largest of values in memory, and how many are larger."""
    rank = values.numel() - k
    if values.device.type == "cpu":
        value = np.partition(values.numpy(), rank)[rank]  # introselect
    else:
        value = values.kthvalue(rank + 1).values
    return float(value), int((values > float(value)).sum())
