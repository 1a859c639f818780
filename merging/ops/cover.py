"""DC-Merge's update: task vectors merged in a basis that covers the directions of all of them.

Shapes: task vectors are O×I; the triplets of all tasks together have K directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from merging.ops.spectral_merge import Triplets, polar_factor


def merge_in_cover(parts: Sequence[Triplets], density: float) -> torch.Tensor:
    """Merge truncated task vectors in their common basis, each in its own block.

    Source: arXiv:2603.06242, CVPR 2026.

    Args:
        parts: Leading triplets of each task vector, together at most min(O, I).
        density: Share of the entries in the common basis that are kept of each.
    """
    left = polar_factor(torch.cat([part.left for part in parts], dim=1))
    right = polar_factor(torch.cat([part.right for part in parts], dim=0))
    merged = _mean_of_agreeing(
        [
            _keep_largest((left.mT @ part.left * part.values) @ (part.right @ right.mT), density)
            for part in parts
        ]
    )
    blocks = torch.block_diag(*(torch.ones(2 * [len(part.values)]) for part in parts))
    return left @ merged.mul_(blocks.to(merged)) @ right


def smoothed(part: Triplets, how: Literal["none", "linear", "average"], rho: float) -> Triplets:
    """Triplets with values of the same sum: as they are, on a straight line, or all alike.

    Args:
        part: Triplets, largest first.
        how: See above.
        rho: Of a line, its first value over its last, unless the part's own are closer together.
    """
    values = part.values
    if how == "none":
        return part
    ratio = 1.0 if how == "average" else min(rho, float(values[0] / values[-1]))
    line = torch.linspace(ratio, 1, len(values), dtype=values.dtype, device=values.device)
    return part._replace(values=line * (values.sum() / line.sum()))


def _keep_largest(C: torch.Tensor, density: float) -> torch.Tensor:
    """A share of the entries of C, and all that are as large as the smallest of these."""
    magnitudes = C.abs()
    count = max(1, int(density * C.numel()))
    threshold = magnitudes.view(-1).kthvalue(C.numel() - count + 1).values
    return C.mul_(magnitudes >= threshold)


def _mean_of_agreeing(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Entry by entry, the mean of what has the sign of the sum; 0 where the sum is 0."""
    stacked = torch.stack(list(matrices))
    elected = stacked.sum(dim=0).sign()
    agrees = (stacked.sign() == elected) & (elected != 0)
    return (stacked * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
