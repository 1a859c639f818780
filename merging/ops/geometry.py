"""What the cost of merging a tensor depends on, and what it comes to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from merging.ops.blocks import CPU_BLOCK, DEVICE_BLOCK


@dataclass(frozen=True, slots=True)
class Cost:
    """What one problem costs, for planning.

    Attributes:
        flops: Floating-point operations; a multiply-add counts as 2.
        workspace_bytes: Peak device memory beyond the stored-dtype inputs that are resident.
    """

    flops: float
    workspace_bytes: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of a problem as cost functions see it.

    Attributes:
        shape: As stored.
        num_experts: How many tensors are merged.
        row_block: As in :class:`~merging.method.Task`.
        transposed: As in :class:`~merging.method.Task`.
        ranks: As in :class:`~merging.method.Task`.
        on_host: A CPU solves, as far as is known.
        tiled_shape: Of the tensor of which this is a tile; empty if it is none.
    """

    shape: tuple[int, ...]
    num_experts: int
    row_block: int = 0
    transposed: bool = False
    ranks: tuple[int, ...] = ()
    on_host: bool = False
    tiled_shape: tuple[int, ...] = ()

    @property
    def num_entries(self) -> int:
        """Entries of the tensor."""
        return math.prod(self.shape)

    def block_bytes(self, num_buffers: int) -> int:
        """Bytes of float32 buffers of a block each, and of one in which a result is rounded."""
        size = CPU_BLOCK if self.on_host else DEVICE_BLOCK
        return 4 * (num_buffers + 1) * min(self.num_entries, size)

    @property
    def matrix(self) -> tuple[int, int]:
        """Output rows and input columns: trailing dimensions unrolled, a vector as one row."""
        if len(self.shape) < 2:
            rows, columns = 1, self.num_entries
        else:
            rows, columns = self.shape[0], math.prod(self.shape[1:])
        return (columns, rows) if self.transposed else (rows, columns)
