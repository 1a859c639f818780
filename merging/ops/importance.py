"""Which entries of an expert matter: the size of a change times how its row's softmax diverges."""

from __future__ import annotations

import torch

from merging.ops.blocks import block_size, work_dtype
from merging.ops.selection import select_largest

_EPS = 1e-8
_RANGES = 1.5
"""Interquartile ranges above the median from which on an entry matters."""


def fuse_important(base: torch.Tensor, expert: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The base with the entries of the expert that matter most.

    Args:
        base: Base tensor, any float dtype.
        expert: Tensor of the same shape.

    Returns:
        Tensor of that shape, float32 (float64 if an input is), and the share that was taken over.
    """
    dtype = work_dtype((base, expert))
    columns = base.shape[-1] if base.ndim else 1
    base_rows, expert_rows = base.reshape(-1, columns or 1), expert.reshape(-1, columns or 1)
    scores = torch.empty(base_rows.shape, dtype=dtype, device=base.device)
    step = max(1, block_size(base.device) // max(1, columns))
    for start in range(0, len(base_rows), step):
        rows = slice(start, start + step)
        scores[rows] = _importance(base_rows[rows].to(dtype), expert_rows[rows].to(dtype))
    if not base.numel():
        return base.to(dtype, copy=True), 0.0
    first, median, third = _quartiles(scores.view(-1))
    taken = scores >= median + _RANGES * (third - first)
    merged = torch.where(taken, expert_rows.to(dtype), base_rows.to(dtype))
    return merged.view(base.shape), float(taken.sum()) / base.numel()


def _importance(base: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    p, q = (torch.softmax(rows, dim=-1) + _EPS for rows in (expert, base))
    divergence = (p * torch.log(p / q)).sum(dim=-1, keepdim=True)
    return (expert - base).abs() * divergence


def _quartiles(values_N: torch.Tensor) -> list[float]:
    """Values at ranks ⌊(N − 1) q⌋ from the smallest."""
    count = len(values_N)
    ranks = [count - int(q * (count - 1)) for q in (0.25, 0.5, 0.75)]
    return [select_largest(values_N, rank)[0] for rank in ranks]
