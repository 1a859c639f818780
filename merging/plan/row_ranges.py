"""Which ranges of rows of embeddings and heads are read."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence

from merging.checkpoint.index import TensorEntry
from merging.plan.vocabulary import Run


def ranges_of(
    runs: Sequence[Run], entries: Mapping[int, TensorEntry]
) -> tuple[list[tuple[int, TensorEntry]], list[Run]]:
    """The ranges of rows that are needed, as tensors, and the runs with parts in these.

    Args:
        runs: Parts are numbers of models and rows.
        entries: The tensors of the models that they name.

    Returns:
        Models with the ranges, each row in one of them; and the runs.
    """
    bounds: dict[int, list[tuple[int, int]]] = {}
    for run in runs:
        for model, first in run.parts:
            bounds.setdefault(model, []).append((first, first + run.count))
    ranges: list[tuple[int, TensorEntry]] = []
    starts: dict[int, list[int]] = {}
    numbers: dict[int, int] = {}
    for model, pairs in bounds.items():
        joined = join_ranges(pairs)
        numbers[model] = len(ranges)
        starts[model] = [start for start, _ in joined]
        ranges += [(model, _rows_of(entries[model], start, end)) for start, end in joined]

    def move(model: int, row: int) -> tuple[int, int]:
        place = bisect.bisect_right(starts[model], row) - 1
        return numbers[model] + place, row - starts[model][place]

    moved = [Run(run.count, tuple(move(*part) for part in run.parts)) for run in runs]
    return ranges, moved


def join_ranges(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Intervals that overlap or touch, as one."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(pairs):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _rows_of(entry: TensorEntry, start: int, end: int) -> TensorEntry:
    """Some rows of a tensor."""
    row_bytes = (entry.end - entry.start) // max(entry.shape[0], 1)
    return dataclasses.replace(
        entry,
        shape=(end - start, *entry.shape[1:]),
        start=entry.start + start * row_bytes,
        end=entry.start + end * row_bytes,
    )
