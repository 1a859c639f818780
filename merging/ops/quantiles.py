"""Exact order statistics of task vectors too long to be held at once: by two histograms.

The bit pattern of a non-negative float32 grows with the number. A histogram of the upper 15 of its
31 bits finds where the k-th largest magnitude lies, one of the lower 16 among those that share
these bits finds it exactly. Counts are whole numbers: they add up to the same in any order, however
a vector is cut.

A tensor with fewer entries than a histogram has bins gives its patterns instead. Magnitudes of
float64 task vectors count as the float32 nearest to them.

Shapes: E experts, N entries of a tensor or tile; results are flat and hold one expert after
another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from merging.ops.bins import COARSE_BINS, FINE_BINS
from merging.ops.blocks import blocks_of, work_dtype

_LOW_BITS = 16
_ALL = -1
"""In place of a pattern's upper bits: nothing is trimmed. In place of a count: as many as there
are."""


def count_coarse(
    base: torch.Tensor,
    experts: Iterator[torch.Tensor],
    densities: Sequence[float],
    *,
    is_tile: bool,
) -> torch.Tensor:
    """Histograms of the patterns' upper bits; zeros for experts of density 1.

    Args:
        base: Base tensor, or a tile of it.
        experts: Expert tensors likewise.
        densities: Share of each that is to be kept.
        is_tile: There are other tiles: these are counts even if the entries are few.
    """
    parts = []
    for expert, density in zip(experts, densities, strict=True):
        counter = _Counter(base.numel(), COARSE_BINS, base.device, is_tile=is_tile)
        if density < 1:
            for patterns, target in counter.blocks(base, expert):
                counter.add(patterns if counter.is_raw else patterns >> _LOW_BITS, target)
        parts.append(counter.counts)
    return torch.cat(parts)


def count_fine(
    base: torch.Tensor,
    experts: Iterator[torch.Tensor],
    chosen_E2: torch.Tensor,
    *,
    is_tile: bool,
) -> torch.Tensor:
    """Histograms of the lower bits of the patterns whose upper ones :func:`choose_coarse` chose."""
    parts = []
    for expert, upper in zip(experts, chosen_E2.view(-1, 2)[:, 0].tolist(), strict=True):
        counter = _Counter(base.numel(), FINE_BINS, base.device, is_tile=is_tile)
        if upper != _ALL:
            for patterns, target in counter.blocks(base, expert):
                is_there = patterns >> _LOW_BITS == upper
                if counter.is_raw:
                    counter.add(patterns.where(is_there, _ALL), target)
                else:
                    counter.add(patterns[is_there] & (FINE_BINS - 1), target)
        parts.append(counter.counts)
    return torch.cat(parts)


def choose_coarse(
    parts: Iterator[torch.Tensor], densities: Sequence[float], *, keeps_ties: bool
) -> torch.Tensor:
    """From all tensors' counts: in which bin each threshold lies, and its rank there from above.

    Args:
        parts: Results of :func:`count_coarse`.
        densities: Share to keep of each expert's D entries.
        keeps_ties: The threshold is the (D − ⌊density·D⌋)-th smallest, and all entries of that
            magnitude stay; otherwise exactly max(1, ⌊density·D⌋) entries stay.
    """
    counts, num_entries = _add_up(parts, len(densities), COARSE_BINS, _LOW_BITS)
    rows = []
    for expert, density in enumerate(densities):
        if density == 1 or not num_entries[expert]:
            rows += [_ALL, _ALL]
            continue
        kept = int(density * num_entries[expert])
        rank = min(kept + 1, num_entries[expert]) if keeps_ties else max(1, kept)
        upper, above = _from_above(counts[expert], rank)
        rows += [upper, rank - above]
    return torch.tensor(rows, dtype=torch.int64)


def choose_fine(
    parts: Iterator[torch.Tensor], chosen_E2: torch.Tensor, *, keeps_ties: bool
) -> torch.Tensor:
    """From all tensors' counts: the pattern of each threshold, and how many entries equal to it
    are kept.

    Args:
        parts: Results of :func:`count_fine`.
        chosen_E2: Result of :func:`choose_coarse`.
        keeps_ties: As there.
    """
    chosen = chosen_E2.view(-1, 2).tolist()
    counts, _ = _add_up(parts, len(chosen), FINE_BINS, 0)
    rows = []
    for expert, (upper, rank) in enumerate(chosen):
        if upper == _ALL:
            rows += [0, _ALL]
            continue
        lower, above = _from_above(counts[expert], rank)
        rows += [upper << _LOW_BITS | lower, _ALL if keeps_ties else rank - above]
    return torch.tensor(rows, dtype=torch.int64)


def kth_magnitude(values_N: torch.Tensor, k: int) -> tuple[float, int]:
    """Exact k-th largest of non-negative float32 values, and how many are larger.

    Its time hardly depends on the values. A selection in memory is as fast where all are different,
    and takes three times as long on the differences of bfloat16 tensors, most of which are equal to
    others (16 M values, one thread).
    """
    patterns_N = values_N.view(torch.int32)
    blocks = [patterns_N[block] for block in blocks_of(values_N.numel(), values_N.device)]
    coarse = torch.zeros(COARSE_BINS, dtype=torch.int64, device=values_N.device)
    for patterns in blocks:
        coarse += torch.bincount(patterns >> _LOW_BITS, minlength=COARSE_BINS)
    upper, above = _from_above(coarse, k)
    fine = torch.zeros(FINE_BINS, dtype=torch.int64, device=values_N.device)
    for patterns in blocks:
        there = patterns[patterns >> _LOW_BITS == upper]
        fine += torch.bincount(there & (FINE_BINS - 1), minlength=FINE_BINS)
    lower, above_in_bin = _from_above(fine, k - above)
    threshold = torch.tensor(upper << _LOW_BITS | lower, dtype=torch.int32).view(torch.float32)
    return float(threshold), above + above_in_bin


def read_thresholds(found_E2: torch.Tensor) -> tuple[list[float], list[float]]:
    """Thresholds, and how many entries equal to each are kept, of :func:`choose_fine`'s result."""
    patterns, ties = found_E2.cpu().view(-1, 2).unbind(1)
    thresholds = patterns.to(torch.int32).view(torch.float32).tolist()
    return thresholds, [math.inf if count == _ALL else count for count in ties.tolist()]


class _Counter:
    """Collects the numbers of one expert."""

    def __init__(
        self, num_entries: int, num_bins: int, device: torch.device, *, is_tile: bool
    ) -> None:
        self.is_raw = num_entries < num_bins and not is_tile
        self._num_bins = num_bins
        size = num_entries if self.is_raw else num_bins
        self.counts = torch.zeros(size, dtype=torch.int64, device=device)

    def blocks(
        self, base: torch.Tensor, expert: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, slice]]:
        """Bit patterns of the magnitudes of a task vector, block by block."""
        base_N, expert_N = base.reshape(-1), expert.reshape(-1)
        dtype = work_dtype((base, expert))
        for block in blocks_of(base.numel(), base.device):
            magnitudes = expert_N[block].to(dtype).sub_(base_N[block].to(dtype)).abs_()
            yield magnitudes.to(torch.float32).view(torch.int32), block

    def add(self, values: torch.Tensor, block: slice) -> None:
        """Count values, or keep them as they are."""
        if self.is_raw:
            self.counts[block] = values
        else:
            self.counts += torch.bincount(values, minlength=self._num_bins)


def _add_up(
    parts: Iterator[torch.Tensor], num_experts: int, num_bins: int, shift: int
) -> tuple[torch.Tensor, list[int]]:
    """Histograms over all parts, and how many entries each expert has in them."""
    counts = torch.zeros(num_experts, num_bins, dtype=torch.int64)
    for part in parts:
        rows = part.cpu().view(num_experts, -1)
        if rows.shape[1] == num_bins:
            counts += rows
            continue
        for expert, patterns in enumerate(rows):
            values = (patterns[patterns != _ALL] >> shift) & (num_bins - 1)
            counts[expert] += torch.bincount(values, minlength=num_bins)
    return counts, counts.sum(1).tolist()


def _from_above(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th largest value, and how many values lie in bins above it."""
    cumulative = counts.flip(0).cumsum(0)
    place = int((cumulative >= rank).to(counts.dtype).argmax())
    above = int(cumulative[place] - counts[len(counts) - 1 - place])
    return len(counts) - 1 - place, above
