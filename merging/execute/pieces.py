"""Cutting a shard's problems into pieces, and pieces into groups that are fetched together.

A *piece* is one call of a method (of each variant's in a sweep): a whole tensor, or a tile (a flat
range of entries) of an elementwise method's tensor. A *group* is a run of pieces whose bytes are
fetched together, so that small neighbouring tensors cost one read per source and not one each.
Cutting depends on the plan alone; the bytes of the result do not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from merging.dtypes import BITS, ITEM_SIZE
from merging.execute.treatment import Treatment, treatment
from merging.plan.cost import group_limit, tile_entries, tile_unit
from merging.plan.plan import Problem, ShardWork, Source


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Entries ``[start, end)`` of one problem's inputs: all of them unless they may be cut.

    Attributes:
        problem: What to produce.
        number: Position of the problem in the shard.
        start: First entry.
        end: Entry after the last.
        treatment: What is done with it.
        sources: Byte ranges of these entries: base first (if there is one), then experts in order.
    """

    problem: Problem
    number: int
    start: int
    end: int
    treatment: Treatment
    sources: tuple[Source, ...]

    @property
    def streaming(self) -> bool:
        """Experts are taken one at a time and forgotten."""
        return self.treatment.is_streaming

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the experts."""
        return (-1,) if self.treatment.is_flat else self.base_shape

    @property
    def base_shape(self) -> tuple[int, ...]:
        """Of the base: the whole input's, or that of a flat tile."""
        whole = self.start == 0 and self.is_last
        return self.problem.input_shape if whole else (self.end - self.start,)

    @property
    def is_partial(self) -> bool:
        """The problem's result is not joined of its pieces' results; each is as large."""
        return self.treatment.is_sum or self.treatment.is_fold

    @property
    def is_last(self) -> bool:
        """Whether the problem is complete with this piece."""
        return self.end == math.prod(self.problem.input_shape)

    @property
    def bytes_read(self) -> int:
        """Bytes of all sources."""
        return sum(source.num_bytes for source in self.sources)

    @property
    def output_bytes(self) -> int:
        """Bytes of the result."""
        whole = self.start == 0 and self.is_last
        entries = self.problem.num_entries
        if not (whole or self.is_partial):
            entries = self.end - self.start
        return entries * ITEM_SIZE[self.problem.dtype]

    @property
    def resident_bytes(self) -> int:
        """Of the sources that are held at once."""
        if not self.streaming:
            return self.bytes_read
        experts = [source.num_bytes for source in self.problem.experts]
        return self.bytes_read + sum(sorted(experts)[-2:]) - sum(experts)

    @property
    def workspace_bytes(self) -> int:
        """What solving takes beside inputs and result, where the solving is done."""
        return max(0, self.problem.device_bytes - self.resident_bytes)


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive pieces fetched together; a streaming piece too large to share stands alone."""

    pieces: tuple[Piece, ...]

    @property
    def num_sources(self) -> int:
        """Fetch units: the most sources that any of its pieces has."""
        return max(len(piece.sources) for piece in self.pieces)


def cut_problems(work: ShardWork) -> Iterator[Piece]:
    """All pieces of a shard, in the order of the output file."""
    known: dict[tuple[int, bool], Treatment] = {}
    for number, problem in enumerate(work.shard.problems):
        key = problem.setting, problem.num_given_apart > 0
        if key not in known:
            setting = work.settings[problem.setting]
            known[key] = treatment(setting, work.shard.num_files, are_apart=key[1])
        entries = math.prod(problem.input_shape)
        if not known[key].is_tiled:
            yield Piece(problem, number, 0, entries, known[key], problem.sources)
            continue
        unit = tile_unit([one.step for one in known[key].applied], problem.input_shape)
        tile = tile_entries(entries, problem.expanded_bytes, work.memory_budget, unit)
        for start in range(0, max(entries, 1), tile):
            end = min(start + tile, entries)
            yield Piece(problem, number, start, end, known[key], _sources(problem, start, end))


def _sources(problem: Problem, start: int, end: int) -> tuple[Source, ...]:
    """What is read for a tile: an adapter's factors come whole, with the first one."""
    factors = problem.factor_positions
    return tuple(
        source if position in factors else _entries(source, start, end)
        for position, source in enumerate(problem.sources)
        if start == 0 or position not in factors
    )


def _entries(source: Source, start: int, end: int) -> Source:
    """The byte range of entries ``[start, end)`` of a source."""
    if source.dtype == BITS:
        first, last = start // 8, -(-end // 8)
    else:
        first, last = (entry * ITEM_SIZE[source.dtype] for entry in (start, end))
    return msgspec.structs.replace(source, start=source.start + first, end=source.start + last)


def group_pieces(pieces: Sequence[Piece], memory_budget: int) -> Iterator[Group]:
    """Join neighbouring pieces while their bytes stay under the plan's ``group_limit``.

    Inputs of a whole group stay in memory while any of its pieces is solved, so pieces that take
    much memory to solve get smaller groups.
    """
    limit = group_limit(memory_budget)
    current: list[Piece] = []
    total = working = 0
    for piece in pieces:
        needed = max(working, piece.workspace_bytes + piece.output_bytes)
        joined = total + piece.bytes_read
        if current and (joined > limit or joined + needed > memory_budget - limit):
            yield Group(tuple(current))
            current, joined = [], piece.bytes_read
            needed = piece.workspace_bytes + piece.output_bytes
        current.append(piece)
        total, working = joined, needed
    if current:
        yield Group(tuple(current))
