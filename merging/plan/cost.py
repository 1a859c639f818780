"""What a problem costs: operations, host memory, device memory.

What a worker holds while it works on one problem, from how it works:

- A method that can be cut anywhere, and a copy, runs in *tiles* whose inputs share a quarter of
  the memory budget (64 MiB at the most). Held: one tile of every source, the method's workspace
  for a tile, and the tile's result in its output type.
- A streaming method holds the base and two experts (one worked on, one arriving); other methods
  hold all their inputs. Added: the method's workspace, in which its float32 result is counted, and
  the result in its output type.

``host_bytes`` is that sum when a CPU solves, ``device_bytes`` what of it is on a device that
solves: everything but the cast result. What is read ahead, and results that wait to be written,
are admitted by the worker only as far as the budget leaves room; they are not part of a problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merging.method import Geometry, MergeMethod

TILE_MULTIPLE = 1 << 16
"""Tiles are cut at multiples of this many entries, so that every tile starts aligned."""

_MIN_GROUP_BYTES = 1 << 20
_MAX_GROUP_BYTES = 64 << 20
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Estimate:
    """Cost of one problem; see the module's text for what is counted."""

    flops: float
    host_bytes: int
    device_bytes: int


@dataclass(frozen=True, slots=True)
class Load:
    """What of a problem its cost depends on.

    Attributes:
        shape: Of the tensor, as stored.
        transposed: It is stored in×out.
        base_bytes: Stored bytes of the base tensor; 0 if there is none.
        expert_bytes: Stored bytes of each expert's tensor.
        item_size: Bytes of an entry of the output.
    """

    shape: tuple[int, ...]
    transposed: bool
    base_bytes: int
    expert_bytes: Sequence[int]
    item_size: int

    @property
    def geometry(self) -> Geometry:
        """As the method's cost function sees it."""
        return Geometry(self.shape, len(self.expert_bytes), transposed=self.transposed)


def group_limit(memory_budget: int) -> int:
    """Bytes fetched together: enough for long reads, a quarter of the budget at the most."""
    return max(_MIN_GROUP_BYTES, min(_MAX_GROUP_BYTES, memory_budget // 4))


def tile_entries(num_entries: int, bytes_read: int, memory_budget: int) -> int:
    """Entries of one tile of a problem that can be cut anywhere."""
    per_entry = max(1, bytes_read // max(num_entries, 1))
    fitting = group_limit(memory_budget) // per_entry // TILE_MULTIPLE * TILE_MULTIPLE
    return max(TILE_MULTIPLE, fitting)


def estimate(
    method: MergeMethod | None, parameters: Any, load: Load, memory_budget: int
) -> Estimate:
    """The cost of one problem.

    Args:
        method: None for a copy.
        parameters: The method's resolved parameters.
        load: The problem.
        memory_budget: Host bytes that a worker may use for tensors.
    """
    geometry = load.geometry
    flops = method.cost(geometry, parameters).flops if method else 0.0
    entries = geometry.num_entries
    inputs = load.base_bytes + sum(load.expert_bytes)
    if method is None or method.separable == "elementwise":
        tile = min(entries, tile_entries(entries, inputs, memory_budget))
        inputs = -(-inputs * tile // max(entries, 1))
        geometry = Geometry((tile,), geometry.num_experts) if tile < entries else geometry
        entries = tile
    elif method.streaming:
        inputs = load.base_bytes + sum(sorted(load.expert_bytes)[-2:])
    workspace = 0
    if method is not None:
        workspace = max(method.cost(geometry, parameters).workspace_bytes, entries * _FLOAT32_BYTES)
    on_device = inputs + workspace
    return Estimate(flops, on_device + entries * load.item_size, on_device)
