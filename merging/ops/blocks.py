"""Elementwise work at the speed of memory: in blocks that stay in cache, in place.

An expression on whole tensors makes a pass over memory for each operator. A chain of in-place
operators on one block after another makes a single pass, needs scratch for one block only, and
gives the same bits however a tensor was cut, because every operator rounds each entry by itself.
For that last property multiplications and additions stay separate operators: fused ones
(``add`` with ``alpha``, ``addcmul``) may round differently at the end of a vector.

Planning asks :func:`elementwise_workspace`, so torch is not imported with this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CPU_BLOCK = 1 << 17
"""Entries. A handful of float32 buffers of this size stay in cache, and calling an operator costs
little beside running it; measured best from 2¹⁶ to 2¹⁹."""

_DEVICE_BLOCK = 1 << 20
"""Entries. On an accelerator a block only has to be large beside the launch of a kernel."""


def block_size(device: torch.device) -> int:
    """Entries per block on that device."""
    return _CPU_BLOCK if device.type == "cpu" else _DEVICE_BLOCK


def blocks_of(num_entries: int, device: torch.device, rows: int = 1) -> Iterator[slice]:
    """Slices that cover a flat tensor, or so many at once, block by block, in order."""
    size = max(1, block_size(device) // rows)
    for start in range(0, num_entries, size):
        yield slice(start, min(start + size, num_entries))


def elementwise_workspace(num_entries: int, num_buffers: int) -> int:
    """Bytes of a float32 result and of a method's block buffers, on whichever device has more."""
    return 4 * (num_entries + num_buffers * min(num_entries, _DEVICE_BLOCK))


def work_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The type to compute in: float32, or float64 if an input has it."""
    import torch

    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def inner_product(x: torch.Tensor, y: torch.Tensor) -> float:
    """⟨x, y⟩ of two contiguous tensors of one shape, in float64, block after block."""
    import torch

    total = torch.zeros((), dtype=torch.float64, device=x.device)
    size = block_size(x.device)
    for x_block, y_block in zip(x.view(-1).split(size), y.view(-1).split(size), strict=True):
        total += torch.dot(x_block.double(), y_block.double())
    return float(total)
