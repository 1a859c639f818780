"""Exact order statistics of numbers too many to be held at once: by two histograms.

The bit pattern of a non-negative float32 grows with the number. A histogram of the upper 15 of its
31 bits finds where the k-th largest lies, one of the lower 16 among those that share these bits
finds it exactly. Counts are whole numbers: they add up to the same in any order, however a tensor
is cut.

A tensor with fewer entries than a histogram has bins gives its patterns instead. Numbers in float64
count as the float32 nearest to them.

Numbers come in *rows*, each with a rank that is sought in it over all tensors: the magnitudes of an
expert's task vector, say. Results are flat and hold one row after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from merging.ops.bins import COARSE_BINS, FINE_BINS
from merging.ops.blocks import blocks_of, work_dtype
from merging.ops.selection import Rank, Threshold

_LOW_BITS = 16
_ALL = -1
"""In place of a pattern's upper bits: no rank is sought. In place of a count: as many as there are.
In place of a pattern: none."""

Row = Callable[[slice], torch.Tensor]
"""The non-negative numbers of a block of a tensor's, or a tile's, flat entries."""


def row_of(numbers_N: torch.Tensor) -> Row:
    """The magnitudes of numbers that are at hand; there may be fewer than entries."""
    return lambda block: numbers_N[block].abs()


def magnitudes(base: torch.Tensor, expert: torch.Tensor) -> Row:
    """Those of a task vector's entries."""
    base_N, expert_N = base.reshape(-1), expert.reshape(-1)
    dtype = work_dtype((base, expert))
    return lambda block: expert_N[block].to(dtype).sub(base_N[block].to(dtype)).abs_()


def count_coarse(
    rows: Iterable[Row | None], num_entries: int, device: torch.device, *, is_tile: bool
) -> torch.Tensor:
    """Histograms of the patterns' upper bits; nothing for rows in which no rank is sought.

    Args:
        rows: Numbers of a tensor, or of a tile of one.
        num_entries: Of each row; the histograms' size depends on it.
        device: Where the numbers are.
        is_tile: There are other tiles: these are counts even if the entries are few.
    """
    parts = []
    for row in rows:
        counter = _Counter(num_entries, COARSE_BINS, device, is_tile=is_tile)
        if row is not None:
            for patterns, target in counter.blocks(row):
                counter.add(patterns if counter.is_raw else patterns >> _LOW_BITS, target)
        parts.append(counter.counts)
    return torch.cat(parts)


def count_fine(
    rows: Iterable[Row | None],
    chosen_R2: torch.Tensor,
    num_entries: int,
    device: torch.device,
    *,
    is_tile: bool,
) -> torch.Tensor:
    """Histograms of the lower bits of the patterns whose upper ones :func:`choose_coarse` chose."""
    parts = []
    for row, upper in zip(rows, chosen_R2.view(-1, 2)[:, 0].tolist(), strict=True):
        counter = _Counter(num_entries, FINE_BINS, device, is_tile=is_tile)
        if row is not None and upper != _ALL:
            for patterns, target in counter.blocks(row):
                is_there = patterns >> _LOW_BITS == upper
                if counter.is_raw:
                    counter.add(patterns.where(is_there, _ALL), target)
                else:
                    counter.add(patterns[is_there] & (FINE_BINS - 1), target)
        parts.append(counter.counts)
    return torch.cat(parts)


def choose_coarse(parts: Iterable[torch.Tensor], ranks: Sequence[Rank | None]) -> torch.Tensor:
    """From all tensors' counts: in which bin each row's number lies, and its rank there from above.

    Args:
        parts: Results of :func:`count_coarse`.
        ranks: Which number of each row is sought, if any.
    """
    counts, num_entries = _add_up(parts, len(ranks), COARSE_BINS, _LOW_BITS)
    rows = []
    for number, rank in enumerate(ranks):
        if rank is None or not num_entries[number]:
            rows += [_ALL, _ALL]
            continue
        place = rank(num_entries[number])
        upper, above = _from_above(counts[number], place)
        rows += [upper, place - above]
    return torch.tensor(rows, dtype=torch.int64)


def choose_fine(
    parts: Iterable[torch.Tensor], chosen_R2: torch.Tensor, *, keeps_ties: bool
) -> torch.Tensor:
    """From all tensors' counts: the pattern of each row's number, and how many that are equal to it
    are kept: just so many that it is the last, or all.

    Args:
        parts: Results of :func:`count_fine`.
        chosen_R2: Result of :func:`choose_coarse`.
        keeps_ties: All are kept.
    """
    chosen = chosen_R2.view(-1, 2).tolist()
    counts, _ = _add_up(parts, len(chosen), FINE_BINS, 0)
    rows = []
    for number, (upper, rank) in enumerate(chosen):
        if upper == _ALL:
            rows += [0, _ALL]
            continue
        lower, above = _from_above(counts[number], rank)
        rows += [upper << _LOW_BITS | lower, _ALL if keeps_ties else rank - above]
    return torch.tensor(rows, dtype=torch.int64)


def read_thresholds(found_R2: torch.Tensor) -> list[Threshold]:
    """What :func:`choose_fine` found."""
    patterns, ties = found_R2.cpu().view(-1, 2).unbind(1)
    values = patterns.to(torch.int32).view(torch.float32).tolist()
    counts = [math.inf if count == _ALL else count for count in ties.tolist()]
    return [Threshold(*pair) for pair in zip(values, counts, strict=True)]


class _Counter:
    """Collects the numbers of one row."""

    def __init__(
        self, num_entries: int, num_bins: int, device: torch.device, *, is_tile: bool
    ) -> None:
        self.is_raw = num_entries < num_bins and not is_tile
        self._num_entries = num_entries
        self._num_bins = num_bins
        size = num_entries if self.is_raw else num_bins
        empty = _ALL if self.is_raw else 0
        self.counts = torch.full((size,), empty, dtype=torch.int64, device=device)

    def blocks(self, row: Row) -> Iterator[tuple[torch.Tensor, slice]]:
        """Bit patterns of a row's numbers, block by block."""
        for block in blocks_of(self._num_entries, self.counts.device):
            yield row(block).to(torch.float32).view(torch.int32), block

    def add(self, values: torch.Tensor, block: slice) -> None:
        """Count values, or keep them as they are."""
        if self.is_raw:
            self.counts[block.start : block.start + len(values)] = values
        else:
            self.counts += torch.bincount(values, minlength=self._num_bins)


def _add_up(
    parts: Iterable[torch.Tensor], num_rows: int, num_bins: int, shift: int
) -> tuple[torch.Tensor, list[int]]:
    """Histograms over all parts, and how many numbers each row has in them."""
    counts = torch.zeros(num_rows, num_bins, dtype=torch.int64)
    for part in parts:
        rows = part.cpu().view(num_rows, -1)
        if rows.shape[1] == num_bins:
            counts += rows
            continue
        for number, patterns in enumerate(rows):
            values = (patterns[patterns != _ALL] >> shift) & (num_bins - 1)
            counts[number] += torch.bincount(values, minlength=num_bins)
    return counts, counts.sum(1).tolist()


def _from_above(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th largest value, and how many values lie in bins above it."""
    cumulative = counts.flip(0).cumsum(0)
    place = int((cumulative >= rank).to(counts.dtype).argmax())
    above = int(cumulative[place] - counts[len(counts) - 1 - place])
    return len(counts) - 1 - place, above
