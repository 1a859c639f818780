"""Histograms of :mod:`merging.ops.quantiles`, for planning, which imports no torch."""

from __future__ import annotations

COARSE_BINS = 1 << 15
"""Of the upper bits of a magnitude's pattern."""

FINE_BINS = 1 << 16
"""Of the lower ones."""


def numbers_of(num_entries: int, num_bins: int) -> int:
    """Numbers kept of one expert's tensor: a histogram, or its patterns if those are fewer."""
    return min(num_entries, num_bins)
