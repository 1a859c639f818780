"""Exact thresholds of many values: the k-th largest without sorting or holding all of them.

The values come in blocks, as often as they are asked for. A sample says between which two bounds
the k-th largest lies, almost surely; one pass then counts what is beyond these and keeps what is
between them, a few in a hundred, among which a selection finds it. Often a bound is the answer: of
the differences of bfloat16 weights a great many are equal. Several ranks share the pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from merging.ops.blocks import as_array, count_true, positions_of

_SAMPLE = 1 << 16
"""Values in a sample, at least; about 2 in 100 of all values then lie between the bounds."""

_DEVIATIONS = 6
"""Standard deviations of a sampled rank that the bounds are apart from it."""

Blocks = Callable[[], Iterator[torch.Tensor]]
"""A pass over non-negative values, in blocks of which each may only be used until the next."""

Rank = Callable[[int], int]
"""Which of so many values is sought, counted from the largest, which is 1; 0: none."""


def last_of_largest(share: float) -> Rank:
    """The last of so large a share of the numbers, the largest; at least the first."""
    return lambda size: max(1, int(share * size))


def first_beyond_largest(share: float) -> Rank:
    """The first that is not of the share: the (D - ⌊share D⌋)-th smallest of D."""
    return lambda size: min(int(share * size) + 1, size)


class Threshold(NamedTuple):
    """The value of a rank: it and larger ones are so many.

    Attributes:
        value: 0 if all values are meant, infinity if none.
        ties: How many that are equal to it are among them.
    """

    value: float
    ties: float


ALL = Threshold(0.0, 0)
NONE = Threshold(math.inf, 0)


def sample_of(values_N: torch.Tensor) -> torch.Tensor:
    """Evenly spread entries of a flat tensor, or all of a short one.

    An odd distance leaves no column out.
    """
    return values_N[:: values_N.numel() // (2 * _SAMPLE) | 1]


def find_thresholds(
    blocks: Blocks,
    sample: torch.Tensor,
    ranks: Sequence[Rank],
    *,
    is_whole: bool = False,
    skips_zeros: bool = False,
) -> list[Threshold]:
    """The exact threshold of each rank. NaN counts as largest.

    Args:
        blocks: Passes over all values.
        sample: Some of them, as :func:`sample_of` chooses them.
        ranks: Of how many values there are.
        is_whole: The sample is all of them.
        skips_zeros: Zeros among the values of the blocks, not of the sample, do not count.
    """
    if is_whole:
        return [_select(sample, rank(sample.numel())) for rank in ranks]
    ascending = np.sort(sample.cpu().numpy())  # ten times as fast as torch, which sorts indices too
    searches = [_Search(ascending, rank, 0.0 if skips_zeros else -1.0) for rank in ranks]
    while pending := [search for search in searches if search.found is None]:
        num_values = num_zeros = 0
        for block in blocks():
            values = as_array(block)
            num_values += len(values)
            num_zeros += count_true(values == 0) if skips_zeros else 0
            for search in pending:
                search.look(values)
        for search in pending:
            search.conclude(num_values, num_zeros)
    return [search.found for search in searches if search.found is not None]


class _Search:
    """Counts the values beyond two bounds, and keeps those between them.

    Attributes:
        found: The threshold, once a pass has found it.
    """

    def __init__(self, ascending: np.ndarray, rank: Rank, floor: float) -> None:
        self.found: Threshold | None = None
        self._rank = rank
        self._floor = floor  # below all values that count
        count = ascending.size
        k = rank(count)
        margin = _DEVIATIONS * math.sqrt(k * max(0, 1 - k / max(1, count))) + 1
        first, last = math.floor(k - margin), math.ceil(k + margin)
        high = float(ascending[count - 1 - first]) if 0 <= first < count else math.inf
        self._search(float(ascending[count - 1 - last]) if last < count else floor, high)

    def _search(self, low: float, high: float) -> None:
        self._low, self._high = low, high
        self._counts = [0, 0, 0, 0]
        self._between: list[Any] = []

    def look(self, values: Any) -> None:
        """Take in a block."""
        low, high = self._low, self._high
        masks = [values <= high, values < high, values <= low, values < low]
        self._between.append(values[positions_of(masks[1] > masks[2])])
        for number, mask in enumerate(masks):
            self._counts[number] += count_true(mask)

    def conclude(self, num_entries: int, num_skipped: int) -> None:
        """After a pass over so many values: the threshold is found, or others are the bounds."""
        k, low, high = self._rank(num_entries - num_skipped), self._low, self._high
        upto_high, below_high, upto_low, below_low = self._counts
        if k <= 0:
            self.found = NONE
        elif k >= num_entries - num_skipped:
            self.found = ALL
        elif k <= num_entries - upto_high and high < math.inf:  # the sample misled us
            self._search(high, math.inf)
        elif k <= num_entries - below_high:
            self.found = Threshold(high, k - (num_entries - upto_high))
        elif k <= num_entries - upto_low:
            first = num_entries - below_high
            self.found = _select(_joined(self._between), k - first, partial=True)
        elif k <= num_entries - below_low:
            self.found = Threshold(low, k - (num_entries - upto_low))
        else:
            self._search(self._floor, low)
        self._between = self._between if self.found is None else []


def _joined(parts: list[Any]) -> torch.Tensor:
    if isinstance(parts[0], np.ndarray):
        return torch.from_numpy(np.concatenate(parts))
    return torch.cat(parts)


def _select(values: torch.Tensor, k: int, *, partial: bool = False) -> Threshold:
    """The threshold of the k largest of values in memory, which may be part of all."""
    if k <= 0:
        return NONE
    if k >= values.numel() and not partial:
        return ALL
    value, above = select_largest(values, k)
    return Threshold(value, k - above)


def select_largest(values: torch.Tensor, k: int) -> tuple[float, int]:
    """The exact k-th largest of values in memory, and how many are larger."""
    rank = values.numel() - k
    if values.device.type == "cpu":
        value = np.partition(values.numpy(), rank)[rank]  # introselect
    else:
        value = values.kthvalue(rank + 1).values
    return float(value), int((values > float(value)).sum())
