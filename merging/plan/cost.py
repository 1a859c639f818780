"""What a problem costs: operations, host memory, device memory; and the row block that fits.

What a worker holds while it works on one problem, from how it works:

- A method that can be cut anywhere (or between rows), and a copy, runs in *tiles* whose inputs
  share a quarter of the memory budget (64 MiB at the most). Held: one tile of every source, the
  method's workspace for a tile, and the tile's result in its output type (the whole result of a
  sum or fold over tiles).
- What a problem is given of earlier passes is held beside that.
- A streaming method holds the base and two experts (one worked on, one arriving); other methods
  hold all their inputs. Added: the method's workspace, in which its float32 result is counted
  unless it rounds that block by block, and the result in its output type.
- An adapter's factors are read whole and held in float32 while the tensor is worked on. Where a
  method needs the expert that they make, that is a float32 tensor (or tile) more.
- Methods compute in float64 if an input is float64: their workspace is then twice as large.
- Variants of a sweep are worked on one after the other. They share one pass over the inputs if all
  of them solve the same problem of a layer; else all inputs are held, and whole tensors unless all
  variants can be cut anywhere.

``device_bytes`` is what of that is where the solving is done: everything but the cast result (with
it on a GPU, if the method rounds).
``host_bytes`` is all of it when a CPU solves; in a plan for workers with a GPU (one with a device
budget) inputs and cast result. What is read ahead, and results that wait to be written, are
admitted by the worker only as far as the budget leaves room; they are not part of a problem.

A tensor of a method that is separable by rows, too large as a whole, is solved in blocks of rows:
the largest multiple of 64 that fits. The numbers here decide that, so it is the same everywhere.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from merging.dtypes import ITEM_SIZE
from merging.layered import group_by_problem, layer_cost
from merging.method import Cost, Geometry, MergeMethod, Step
from merging.ops.blocks import TILE_MULTIPLE
from merging.ops.layer_method import LayerVariant
from merging.plan.plan import Problem

ROW_MULTIPLE = 64
"""Row blocks are multiples of this: products of so many rows run at full speed."""

_MIN_GROUP_BYTES = 1 << 20
_MAX_GROUP_BYTES = 64 << 20
_FLOAT32_BYTES = 4


Application = tuple[Step | None, Any]
"""A method, or one of its steps, with resolved parameters; None is a copy."""


@dataclass(frozen=True, slots=True)
class ProblemCost:
    """Cost of one problem; see the module's text for what is counted.

    Attributes:
        flops: Operations.
        host_bytes: Host memory held at once.
        device_bytes: Memory held at once where the solving is done.
        row_block: Rows solved at a time; 0 means all.
    """

    flops: float
    host_bytes: int
    device_bytes: int
    row_block: int = 0


class Needs(Protocol):
    """What says how much memory a problem takes."""

    @property
    def host_bytes(self) -> int:
        """Host memory held at once."""

    @property
    def device_bytes(self) -> int:
        """Memory held at once where the solving is done."""


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes that one worker may use for tensors.

    Attributes:
        host: On the host.
        device: On its GPU; None if nothing is known of one, and a CPU may have to solve.
    """

    host: int
    device: int | None = None

    def hold(self, cost: Needs) -> bool:
        """Whether a problem of this cost fits."""
        fits_device = self.device is None or cost.device_bytes <= self.device
        return cost.host_bytes <= self.host and fits_device


@dataclass(frozen=True, slots=True)
class Load:
    """What of a problem its cost depends on.

    Attributes:
        shape: Of the tensor, as stored.
        transposed: It is stored in×out.
        base_bytes: Stored bytes of the base tensor; 0 if there is none.
        expert_bytes: Stored bytes of each expert's tensor that is read.
        item_size: Bytes of an entry of the result.
        is_double: An input is float64, so that the method computes in float64.
        result_entries: Of the result, where it is not of the inputs' shape.
        factor_bytes: Stored bytes of each factor of the experts' adapters.
        ranks: Of the experts' adapters, 0 for an expert without; empty if each expert is one stored
            tensor.
        num_made: How many experts are not.
        given_bytes: Of what the problem is given beside its inputs.
    """

    shape: tuple[int, ...]
    transposed: bool
    base_bytes: int
    expert_bytes: Sequence[int]
    item_size: int
    is_double: bool = False
    result_entries: int | None = None
    factor_bytes: Sequence[int] = ()
    ranks: tuple[int, ...] = ()
    num_made: int = 0
    given_bytes: int = 0

    @property
    def geometry(self) -> Geometry:
        """As the method's cost function sees it."""
        num_experts = len(self.ranks) or len(self.expert_bytes)
        ranks = () if self.expert_bytes else self.ranks
        return Geometry(self.shape, num_experts, transposed=self.transposed, ranks=ranks)

    @property
    def num_adapters(self) -> int:
        """Experts of which an adapter is a part."""
        return sum(rank > 0 for rank in self.ranks)


def problem_load(problem: Problem) -> Load:
    """What the cost of a problem depends on."""
    factors = problem.factor_positions
    first = 1 if problem.base else 0
    sources = list(enumerate(problem.experts, first))
    return Load(
        shape=problem.input_shape,
        transposed=problem.transposed,
        base_bytes=problem.base.num_bytes if problem.base else 0,
        expert_bytes=tuple(s.num_bytes for place, s in sources if place not in factors),
        item_size=ITEM_SIZE[problem.dtype],
        is_double=any(source.dtype == "F64" for source in problem.sources),
        result_entries=problem.num_entries if problem.source_shape else None,
        factor_bytes=tuple(s.num_bytes for place, s in sources if place in factors),
        ranks=tuple(part.rank for part in problem.parts),
        num_made=problem.num_made,
        given_bytes=sum(source.num_bytes for source in problem.given),
    )


def with_cost(problem: Problem, cost: ProblemCost) -> Problem:
    """The problem with what it costs."""
    return msgspec.structs.replace(
        problem,
        row_block=cost.row_block,
        flops=cost.flops,
        host_bytes=cost.host_bytes,
        device_bytes=cost.device_bytes,
    )


def takes_matrices(method: MergeMethod) -> bool:
    """Whether a method works on matrices of rows×columns, by products, and not entry by entry."""
    return method.default_touch == "linear"


def group_limit(memory_budget: int) -> int:
    """Bytes fetched together: enough for long reads, a quarter of the budget at the most."""
    return max(_MIN_GROUP_BYTES, min(_MAX_GROUP_BYTES, memory_budget // 4))


def tile_entries(
    num_entries: int, bytes_read: int, memory_budget: int, unit: int = TILE_MULTIPLE
) -> int:
    """Entries of one tile of a problem that can be cut at multiples of a unit."""
    per_entry = max(1, bytes_read // max(num_entries, 1))
    return max(unit, group_limit(memory_budget) // per_entry // unit * unit)


def tile_unit(steps: Sequence[Step | None], shape: Sequence[int]) -> int:
    """Entries at whose multiples a tensor of this shape may be cut into tiles."""
    if any(step is not None and step.by_row for step in steps):
        return max(1, math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape))
    return TILE_MULTIPLE


def expansion_flops(num_entries: int, ranks: Sequence[int]) -> float:
    """Operations of making a tensor's experts from the factors of adapters."""
    return 2.0 * num_entries * sum(ranks)


def is_tiled(steps: Sequence[Step | None]) -> bool:
    """Whether all of these can be cut anywhere, so that tensors are worked on in tiles."""
    return all(step is None or step.separable in ("elementwise", "sum", "fold") for step in steps)


def is_streaming(variants: Sequence[Application]) -> bool:
    """Whether one pass over the experts, of which each is forgotten, serves all variants."""
    streaming = all(step is not None and step.streaming for step, _ in variants)
    return streaming and len(group_by_problem(variants)) == 1


def takes_adapters(steps: Sequence[Step | None]) -> bool:
    """Whether adapters are handed to all of these as they are."""
    return all(step is not None and step.takes_adapters for step in steps)


def _adapter_entries(variants: Sequence[Application], load: Load, num_entries: int) -> int:
    """Numbers held of adapters: their factors, and the experts (or tiles of them) made of these.

    Methods that take adapters get an expert that has a tensor of its own beside one expanded, one
    at a time if they forget it.
    """
    if not load.num_adapters:
        return 0
    rows, columns = load.geometry.matrix
    factors = sum(load.ranks) * (rows + columns)
    if takes_adapters([step for step, _ in variants]) and is_streaming(variants):
        return factors + (num_entries if load.expert_bytes else 0)
    stored_columns = rows if load.transposed else columns
    return factors + num_entries * load.num_adapters + ROW_MULTIPLE * stored_columns


def problem_cost(variants: Sequence[Application], load: Load, budgets: Budgets) -> ProblemCost:
    """The cost of one problem, with the largest row block that fits if the whole does not.

    Args:
        variants: What is done with it: one thing, or several different ones in a sweep.
        load: The problem.
        budgets: What a worker may use. If nothing fits, the cost is that of the smallest block.
    """

    def blocked(multiple: int) -> ProblemCost:
        return _cost(variants, load, budgets, multiple * ROW_MULTIPLE)

    whole = blocked(0)
    by_rows = any(step is not None and step.separable == "rows" for step, _ in variants)
    if not by_rows or budgets.hold(whole):
        return whole
    multiples = range(1, -(-load.geometry.matrix[0] // ROW_MULTIPLE))
    fitting = bisect.bisect_left(multiples, x=True, key=lambda n: not budgets.hold(blocked(n)))
    return blocked(max(fitting, 1)) if multiples else whole


def _cost(
    variants: Sequence[Application], load: Load, budgets: Budgets, row_block: int
) -> ProblemCost:
    steps = [step for step, _ in variants]
    ranks = load.geometry.ranks if takes_adapters(steps) else ()
    on_host = budgets.device is None
    geometry = dataclasses.replace(load.geometry, row_block=row_block, ranks=ranks, on_host=on_host)
    entries = geometry.num_entries
    flops = sum(cost.flops for cost in _step_costs(variants, geometry))
    if steps[0] is not None and not takes_adapters(steps):
        flops += expansion_flops(entries, load.ranks)
    inputs = load.base_bytes + sum(load.expert_bytes)
    if is_tiled(steps):
        expanded = inputs + _FLOAT32_BYTES * entries * load.num_made
        unit = tile_unit(steps, load.shape)
        tile = min(entries, tile_entries(entries, expanded, budgets.host, unit))
        inputs = -(-inputs * tile // max(entries, 1))
        if tile < entries:
            geometry = Geometry(
                (tile,), geometry.num_experts, on_host=on_host, tiled_shape=geometry.shape
            )
        entries = tile
        inputs += sum(load.factor_bytes)
    elif is_streaming(variants):
        read = sorted((*load.expert_bytes, *load.factor_bytes))
        inputs = load.base_bytes + sum(read[-2:])
    else:
        inputs += sum(load.factor_bytes)
    inputs += load.given_bytes
    workspace = 0
    rounds = all(step is not None and step.rounds for step in steps)
    if costs := _step_costs(variants, geometry):
        least = 0 if rounds else entries
        workspace = max(least * _FLOAT32_BYTES, *(cost.workspace_bytes for cost in costs))
        workspace += _adapter_entries(variants, load, entries) * _FLOAT32_BYTES
        workspace *= 2 if load.is_double else 1
    result = (entries if load.result_entries is None else load.result_entries) * load.item_size
    if steps[0] is not None and steps[0].separable in ("sum", "fold"):
        workspace += (len(steps) - 1) * result  # the sums of other variants wait for the next tile
    host_bytes = inputs + result + (workspace if on_host else 0)
    device_bytes = inputs + workspace + (result if rounds and not on_host else 0)
    return ProblemCost(flops, host_bytes, device_bytes, row_block)


def _step_costs(variants: Sequence[Application], geometry: Geometry) -> list[Cost]:
    """Of what is worked on at once: variants that share a problem, anything else by itself."""
    costs = []
    for group in group_by_problem(variants):
        layers = [
            LayerVariant(step.layer, parameters)
            for step, parameters in (variants[place] for place in group)
            if isinstance(step, MergeMethod) and step.layer is not None
        ]
        step, parameters = variants[group[0]]
        if len(group) > 1:
            costs.append(layer_cost(geometry, layers))
        elif step is not None:
            costs.append(step.cost(geometry, parameters))
    return costs
