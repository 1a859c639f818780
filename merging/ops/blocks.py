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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CPU_BLOCK = 1 << 17
"""Entries. A handful of float32 buffers of this size stay in cache, and calling an operator costs
little beside running it; measured best from 2¹⁶ to 2¹⁹."""

TILE_MULTIPLE = 1 << 16
"""Entries. Tiles of large tensors are cut at multiples of this, unless they are whole rows: every
tile starts aligned, and blocks of this size are the same however a tensor is cut."""

DEVICE_BLOCK = 1 << 20
"""Entries. On an accelerator a block only has to be large beside the launch of a kernel."""


def block_size(device: torch.device) -> int:
    """Entries per block on that device."""
    return CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK


def blocks_of(num_entries: int, device: torch.device, rows: int = 1) -> Iterator[slice]:
    """Slices that cover a flat tensor, or so many at once, block by block, in order."""
    size = max(1, block_size(device) // rows)
    for start in range(0, num_entries, size):
        yield slice(start, min(start + size, num_entries))


def elementwise_workspace(num_entries: int, num_buffers: int) -> int:
    """Bytes of a float32 result and of a method's block buffers, on whichever device has more."""
    return 4 * (num_entries + num_buffers * min(num_entries, DEVICE_BLOCK))


def result_for(like: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    """Flat memory for a result as long as ``like``: what is given, or new in ``dtype``."""
    import torch

    return torch.empty(like.numel(), dtype=dtype, device=like.device) if out is None else out


def rounded_blocks(
    merged_N: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks of a result: to be computed in ``dtype``, and rounded when the next one is asked for.

    Rounding a block while it is in cache saves the passes over memory that a whole result in
    float32 takes.

    Args:
        merged_N: Flat result of any float dtype.
        dtype: To compute in.

    Yields:
        Where the block is, and uninitialised memory to compute it in.
    """
    import torch

    is_direct = merged_N.dtype == dtype
    size = min(block_size(merged_N.device), merged_N.numel())
    scratch = torch.empty(0 if is_direct else size, dtype=dtype, device=merged_N.device)
    for block in blocks_of(merged_N.numel(), merged_N.device):
        target = merged_N[block]
        total = target if is_direct else scratch[: target.numel()]
        yield block, total
        if not is_direct:
            target.copy_(total)


def as_array(tensor: torch.Tensor) -> Any:
    """A tensor for comparing: as NumPy's array on a CPU, where that takes an eighth of the time."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def count_true(mask: Any) -> int:
    """How many truth values of an array or tensor are true."""
    import numpy as np

    return int(np.count_nonzero(mask) if isinstance(mask, np.ndarray) else mask.sum())


def positions_of(mask: Any) -> Any:
    """Where the truth values of a flat array or tensor are true."""
    import numpy as np

    return np.flatnonzero(mask) if isinstance(mask, np.ndarray) else mask.nonzero().view(-1)


def keep_where(values_N: torch.Tensor, is_kept_N: Any) -> None:
    """Zero the other entries, in place.

    Args:
        values_N: On any device.
        is_kept_N: Truth values, as comparing :func:`as_array` gives them.
    """
    if values_N.device.type != "cpu":
        values_N.mul_(is_kept_N)
        return
    import numpy as np

    # NumPy multiplies by truth values in a third of torch's time.
    np.multiply(values_N.numpy(), is_kept_N, out=values_N.numpy())


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
