"""Linear combinations whose weights follow from the inner products of what is combined.

Interpolation on spheres, means on spheres and Model Stock all give a tensor in the span of their
inputs, with coefficients that depend on lengths and angles alone. So a tensor is read twice: once
for the n×n matrix of inner products, and once for the sum. In between there is nothing but small
matrices, so that both can be done tile by tile.

On a CPU both go through blocks that begin at multiples of :data:`~merging.ops.blocks.TILE_MULTIPLE`
in the whole tensor, whose sums are added up in order: results do not depend on how it is cut.

Shapes: n inputs, R vectors in each (:mod:`merging.ops.vectors`), N entries of a tensor or tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from merging.ops.blocks import DEVICE_BLOCK, TILE_MULTIPLE, result_for, work_dtype
from merging.ops.vectors import Vectors


def add_inner_products(
    sums_Rnn: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    origin: torch.Tensor | None,
    vectors: Vectors,
    offset: int = 0,
) -> None:
    """Add the inner products of n tensors, or of tiles of them, with one another.

    Between tensors as they are everything is in float64, which makes nearly parallel ones harmless.
    Differences from an origin are rounded to the work dtype; so is what a block of a long vector
    comes to, which loses nothing that counts beside that.

    Args:
        sums_Rnn: What tiles before this one came to, in float64; changed in place.
        tensors: Of one shape, of any float dtype.
        origin: Subtracted from each.
        vectors: Of the whole tensor.
        offset: The tile's first entry in the tensor.
    """
    flat = [tensor.reshape(-1) for tensor in tensors]
    device = sums_Rnn.device
    dtype = torch.float64 if origin is None else work_dtype((*tensors, origin))
    size = min(_block_size(device), flat[0].numel())
    scratch = torch.empty((len(flat), size), dtype=dtype, device=device)
    start = torch.empty(size, dtype=dtype, device=device)
    pairs = _Pairs(scratch)
    for block in _blocks(flat[0].numel(), device):
        parts = scratch[:, : block.stop - block.start]
        for part, tensor in zip(parts, flat, strict=True):
            part.copy_(tensor[block])
        if origin is not None:
            parts.sub_(start[: parts.shape[1]].copy_(origin.reshape(-1)[block]))
        for entries, rows, shape in vectors.parts(offset + block.start, offset + block.stop):
            lines = parts[:, entries].unflatten(1, shape)
            if len(lines[0]) == 1 and not vectors.are_columns:
                sums_Rnn[rows.start] += pairs.products(lines[:, 0])
            else:
                order = (2, 0, 1) if vectors.are_columns else (1, 0, 2)
                stacked = lines.permute(order).to(torch.float64, copy=True)
                sums_Rnn[rows] += stacked @ stacked.mT


class _Pairs:
    """Inner products of a few long vectors one by one: quicker than products of matrices are.

    Args:
        like: n vectors of that type.
    """

    def __init__(self, like: torch.Tensor) -> None:
        count = len(like)
        self._pairs = list(itertools.combinations_with_replacement(range(count), 2))
        self._found = like.new_empty(len(self._pairs))
        self._places = torch.empty((count, count), dtype=torch.long, device=like.device)
        for place, (i, j) in enumerate(self._pairs):
            self._places[i, j] = self._places[j, i] = place

    def products(self, vectors: torch.Tensor) -> torch.Tensor:
        """All n×n, in float64."""
        rows = vectors.unbind()
        for (i, j), found in zip(self._pairs, self._found.unbind(), strict=True):
            torch.dot(rows[i], rows[j], out=found)
        return self._found.double()[self._places]


def combine(
    tensors: Sequence[torch.Tensor],
    weights_Rn: torch.Tensor,
    origin: torch.Tensor | None,
    vectors: Vectors,
    offset: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``origin + Σ weight · (tensor − origin)``, or the sum without an origin.

    Args:
        tensors: n tensors of one shape, of any float dtype, or tiles of them.
        weights_Rn: Of each vector of the whole tensor.
        origin: As for :func:`add_inner_products`, likewise ``vectors`` and ``offset``.
        vectors: See there.
        offset: See there.
        out: Flat, of any float dtype, for the result; by default new, float32 (float64 if an input
            is).

    Returns:
        Tensor of that shape.
    """
    flat = [tensor.reshape(-1) for tensor in tensors]
    dtype = work_dtype(tensors if origin is None else (*tensors, origin))
    merged = result_for(tensors[0], dtype, out)
    size = min(_block_size(merged.device), merged.numel())
    scratch = torch.empty((3, size), dtype=dtype, device=merged.device)
    weighting = _Weighting(weights_Rn.to(dtype), vectors)
    for block in _blocks(merged.numel(), merged.device):
        total, term, start = scratch[:, : block.stop - block.start]
        if origin is not None:
            start.copy_(origin.reshape(-1)[block])
        total.zero_()
        for number, tensor in enumerate(flat):
            term.copy_(tensor[block])
            if origin is not None:
                term.sub_(start)
            weighting.add(total, term, number, offset + block.start)
        if origin is not None:
            total.add_(start)
        merged[block].copy_(total)
    return merged.view(tensors[0].shape)


class _Weighting:
    """Adds inputs with their weights, which may differ from vector to vector.

    Args:
        weights_Rn: Of each vector.
        vectors: Of the whole tensor.
    """

    def __init__(self, weights_Rn: torch.Tensor, vectors: Vectors) -> None:
        self._weights = weights_Rn
        self._vectors = vectors
        self._of_all = weights_Rn[0].tolist() if vectors.count == 1 else None

    def add(self, total: torch.Tensor, term: torch.Tensor, number: int, start: int) -> None:
        """Add a block of one input to ``total``; ``term`` may be changed.

        Args:
            total: Flat.
            term: As long.
            number: Of the input.
            start: Of the block, in the whole tensor.
        """
        if self._of_all is not None:
            total.add_(term, alpha=self._of_all[number])
            return
        for entries, rows, shape in self._vectors.parts(start, start + len(term)):
            weights = self._weights[rows, number]
            weights = weights if self._vectors.are_columns else weights[:, None]
            term[entries].view(shape).mul_(weights)
        total.add_(term)


def slerp_weights(products: torch.Tensor, t: float, *, linear_from: float) -> torch.Tensor:
    """Weights of spherical linear interpolation between two vectors (Shoemake, SIGGRAPH 1985).

    ``sin((1 − t)θ)/sin θ`` and ``sin(tθ)/sin θ`` for the angle θ between them; ``1 − t`` and ``t``
    where they are all but parallel.

    Args:
        products: R×2×2.
        t: 0 gives the first vector, 1 the second.
        linear_from: Size of cos θ above which vectors pass for parallel.
    """
    lengths = products.diagonal(dim1=1, dim2=2).sqrt()
    lengths = lengths.where(lengths > 0, 1)
    cosine = (products[:, 0, 1] / lengths.prod(dim=1)).clamp(-1, 1)
    is_linear = cosine.abs() > linear_from
    angle = torch.acos(cosine.where(~is_linear, 0))
    shares = torch.tensor([1 - t, t], dtype=torch.float64, device=products.device)
    curved = torch.sin(angle[:, None] * shares) / torch.sin(angle)[:, None]
    return torch.where(is_linear[:, None], shares, curved)


def _block_size(device: torch.device) -> int:
    return TILE_MULTIPLE if device.type == "cpu" else DEVICE_BLOCK


def _blocks(num_entries: int, device: torch.device) -> Iterator[slice]:
    size = _block_size(device)
    for start in range(0, num_entries, size):
        yield slice(start, min(start + size, num_entries))
