"""How long a plan should take on workers whose rates are known.

A shard passes three stages that overlap: bytes are read, problems solved, results hashed and
written. The slowest one sets the shard's time. Shards are handed out in order, each to the worker
that is free first, and begin when the shards that they need are done. Not counted: workers that
disturb one another, and the time to start them.

Rates differ from machine to machine, so none of this is part of a plan or its digest.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter

import msgspec

from merging.method import Geometry, get_method
from merging.plan.cost import expansion_flops, takes_matrices
from merging.plan.plan import ALIGN, COPY, STATISTICS, Plan, Problem, Shard
from merging.plan.stages import shards_needed
from merging.rates import Rates, storage_kind
from merging.steps import step_of

_SOURCE_SECONDS = 1e-4
"""Of Python and torch for one source of a tensor, beside what depends on sizes."""

_SOURCE_OPERATIONS = 12
"""On each entry of a source, beside a matrix method's products: subtract, normalise, sum, norms."""

_BLOCK_WIDTH = 1024
"""Of the products in a block that is run on samples, as far as their rate goes."""

_SHARD_SECONDS = 0.03
"""Of opening, committing and recording one file."""


class StageSeconds(msgspec.Struct, frozen=True):
    """Seconds of the stages, each by itself, and of all of them overlapping."""

    read: float
    solve: float
    write: float
    total: float


class PlanEstimate(msgspec.Struct, frozen=True):
    """How long a plan should take.

    Attributes:
        total_seconds: From the first shard's start to the last one's end.
        slots: Workers that this is for.
        device: Device whose rates this is for.
        seconds: Sums over all shards; ``total`` is the work of all slots together.
        shards: Seconds of each shard, in order.
    """

    total_seconds: float
    slots: int
    device: str
    seconds: StageSeconds
    shards: tuple[float, ...]


def estimate_seconds(plan: Plan, rates: Rates, slots: int) -> PlanEstimate | None:
    """Estimate the time of a plan; None if nothing is known of a kind of storage that it uses.

    Args:
        plan: Any plan.
        rates: Of the machines that will work on it.
        slots: How many shards are worked on at once.
    """
    stages = [shard_seconds(plan, shard, rates) for shard in plan.shards]
    known = [found for found in stages if found is not None]
    if len(known) < len(stages):
        return None
    free = [0.0] * max(1, slots)
    ends: list[float] = []
    for found, needed in zip(known, shards_needed(plan), strict=True):
        begin = max(free[0], *(ends[index] for index in needed), 0.0)
        ends.append(begin + found.total)
        heapq.heapreplace(free, ends[-1])
    return PlanEstimate(
        total_seconds=max(free),
        slots=max(1, slots),
        device=rates.device,
        seconds=sum_stages(known),
        shards=tuple(found.total for found in known),
    )


def shard_seconds(plan: Plan, shard: Shard, rates: Rates) -> StageSeconds | None:
    """Estimate one shard; None as for :func:`estimate_seconds`."""
    sizes = Counter[str]()
    given = {source for problem in shard.problems for source in problem.given}
    for source in (*given, *(s for problem in shard.problems for s in problem.sources)):
        sizes[storage_kind(plan.files[source.file].uri)] += source.num_bytes
    target = storage_kind(plan.output_uri)
    if target not in rates.written or any(kind not in rates.read for kind in sizes):
        return None
    read = sum(size / rates.read[kind] for kind, size in sizes.items())
    solve = sum(_solve_seconds(plan, problem, rates) for problem in shard.problems)
    write = shard.bytes_written / rates.written[target]
    return StageSeconds(read, solve, write, max(read, solve, write) + _SHARD_SECONDS)


def sum_stages(stages: list[StageSeconds]) -> StageSeconds:
    """Sums by stage."""
    return StageSeconds(
        read=sum(found.read for found in stages),
        solve=sum(found.solve for found in stages),
        write=sum(found.write for found in stages),
        total=sum(found.total for found in stages),
    )


def _num_inputs(problem: Problem) -> int:
    """Tensors of the output's size that go in; an expert that equals the base is none."""
    if not problem.parts:
        return len(problem.sources)
    experts = sum(part.is_stored or part.rank > 0 for part in problem.parts)
    return experts + (problem.base is not None)


def _solve_seconds(plan: Plan, problem: Problem, rates: Rates) -> float:
    entries = math.prod(problem.input_shape)
    if plan.settings[problem.setting].method == ALIGN:  # a source is some of the rows
        return 2 * entries / rates.entries
    passed = (_num_inputs(problem) + 1) * entries / rates.entries
    return passed + _method_seconds(plan, problem, rates) + len(problem.sources) * _SOURCE_SECONDS


def _method_seconds(plan: Plan, problem: Problem, rates: Rates) -> float:
    """Methods for matrices do products (and a little on entries), all others work on entries."""
    name = plan.settings[problem.setting].method
    if name == COPY:
        return 0.0
    if name == STATISTICS:
        return problem.flops / rates.flops_per_second(_BLOCK_WIDTH, _BLOCK_WIDTH)
    entries = math.prod(problem.input_shape)
    step = step_of(get_method(name), plan.settings[problem.setting].step)
    expansion = 0.0
    if not step.takes_adapters:
        expansion = expansion_flops(entries, [part.rank for part in problem.parts])
    rows, columns = Geometry(problem.input_shape, 1, transposed=problem.transposed).matrix
    rows = min(problem.row_block or rows, rows)
    threads = plan.threads / rates.threads if rates.device == "cpu" else 1.0
    double = 2.0 if any(source.dtype == "F64" for source in problem.sources) else 1.0
    product_rate = rates.flops_per_second(rows, columns) * threads
    if not takes_matrices(get_method(name)):
        return expansion / product_rate + (problem.flops - expansion) / rates.operations
    products = problem.flops / product_rate
    operations = _SOURCE_OPERATIONS * _num_inputs(problem) * entries
    return double * (products + operations / rates.operations)
