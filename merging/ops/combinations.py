"""Linear combinations whose weights follow from the inner products of what is combined.

Interpolation on spheres, means on spheres and Model Stock all give a tensor in the span of their
inputs, with coefficients that depend on lengths and angles alone. So a tensor is read twice: once
for the n×n matrix of inner products, and once for the sum. In between there is nothing but small
matrices, so that both can be done tile by tile.

On a CPU, what stretches of :data:`~merging.ops.blocks.TILE_MULTIPLE` entries of the whole tensor
come to is added up in order: results do not depend on how it is cut.

Shapes: n inputs, R vectors in each (:mod:`merging.ops.vectors`), N entries of a tensor or tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from merging.ops.blocks import DEVICE_BLOCK, TILE_MULTIPLE, result_for, work_dtype
from merging.ops.vectors import Vectors

_CPU_BLOCK = 1 << 18
"""Entries: so many that calling a dozen operators costs little beside running them; measured best
from 2¹⁸ to 2¹⁹."""


def add_inner_products(
    sums_Rnn: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    origin: torch.Tensor | None,
    vectors: Vectors,
    offset: int = 0,
) -> None:
    """Add the inner products of n tensors, or of tiles of them, with one another.

    Between tensors as they are everything is in float64, which makes nearly parallel ones harmless.
    Differences from an origin are rounded to the work dtype; so is what a stretch of a long vector
    comes to, which loses nothing that counts beside that.

    Args:
        sums_Rnn: What tiles before this one came to, in float64; changed in place.
        tensors: Of one shape, of any float dtype.
        origin: Subtracted from each.
        vectors: Of the whole tensor.
        offset: The tile's first entry in the tensor.
    """
    dtype = torch.float64 if origin is None else work_dtype((*tensors, origin))
    size = _block_size(tensors[0])
    scratch = torch.empty((len(tensors) + 1, size), dtype=dtype, device=sums_Rnn.device)
    sums = _Sums(sums_Rnn, vectors, dtype)
    full = _stretches(scratch[:-1].unbind())
    for number, blocks in enumerate(_blocks((*tensors, *_listed(origin)), size)):
        *parts, start = scratch[:, : len(blocks[0])]
        if origin is not None:
            start.copy_(blocks[-1])
        for part, block in zip(parts, blocks, strict=False):
            part.copy_(block)
            if origin is not None:
                part.sub_(start)
        stretches = full if len(start) == size else _stretches(parts)
        sums.add(stretches, offset + number * size)
    sums.finish()


_Stretches = list[tuple[torch.Tensor, ...]]


def _stretches(parts: Sequence[torch.Tensor]) -> _Stretches:
    """What of a block is added up at once."""
    size = TILE_MULTIPLE if parts[0].device.type == "cpu" else DEVICE_BLOCK
    return list(_blocks(parts, size))


class _Sums:
    """Inner products as they are added up over blocks.

    Those of long vectors are found one by one, which is quicker than products of matrices are.

    Args:
        sums_Rnn: What they start from; changed in place.
        vectors: Of the whole tensor.
        dtype: Of what is multiplied.
    """

    def __init__(self, sums_Rnn: torch.Tensor, vectors: Vectors, dtype: torch.dtype) -> None:
        self._sums = sums_Rnn
        self._vectors = vectors
        count, device = sums_Rnn.shape[1], sums_Rnn.device
        first, second = torch.triu_indices(count, count, device=device)
        self._pairs = list(itertools.combinations_with_replacement(range(count), 2))
        self._found = torch.empty(len(self._pairs), dtype=dtype, device=device)
        self._each_found = self._found.unbind()
        self._places = torch.empty((count, count), dtype=torch.long, device=device)
        self._places[first, second] = torch.arange(len(self._pairs), device=device)
        self._places[second, first] = self._places[first, second]
        self._of_one = sums_Rnn[0, first, second] if vectors.count == 1 else None

    def add(self, stretches: _Stretches, start: int) -> None:
        """Add those of a block of n tensors, which begins there in the whole tensor."""
        for parts in stretches:
            if self._of_one is not None:
                self._of_one += self._products(parts)
            else:
                self._add_many(parts, start)
            start += len(parts[0])

    def _add_many(self, parts: Sequence[torch.Tensor], start: int) -> None:
        for entries, rows, shape in self._vectors.parts(start, start + len(parts[0])):
            if shape[0] == 1 and not self._vectors.are_columns:
                products = self._products([part[entries] for part in parts])
                self._sums[rows.start] += products.double()[self._places]
            else:
                lines = torch.stack([part[entries].view(shape) for part in parts])
                order = (2, 0, 1) if self._vectors.are_columns else (1, 0, 2)
                stacked = lines.permute(order).to(torch.float64, copy=True)
                self._sums[rows] += stacked @ stacked.mT

    def finish(self) -> None:
        """Write down the sums."""
        if self._of_one is not None:
            self._sums[0] = self._of_one[self._places]

    def _products(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of each pair of n long vectors, until the next call."""
        for (i, j), product in zip(self._pairs, self._each_found, strict=True):
            torch.dot(parts[i], parts[j], out=product)
        return self._found


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
    dtype = work_dtype((*tensors, *_listed(origin)))
    merged = result_for(tensors[0], dtype, out)
    size = _block_size(merged)
    scratch = torch.empty((3, size), dtype=dtype, device=merged.device)
    weighting = _Weighting(weights_Rn.to(dtype), vectors)
    for number, (target, *blocks) in enumerate(_blocks((merged, *tensors, *_listed(origin)), size)):
        total, term, start = scratch[:, : len(target)]
        if origin is not None:
            start.copy_(blocks.pop())
        for place, block in enumerate(blocks):
            weighted = term if place else total
            weighted.copy_(block)
            if origin is not None:
                weighted.sub_(start)
            weighting.weigh(weighted, place, offset + number * size)
            if place:
                total.add_(term)
        if origin is not None:
            total.add_(start)
        target.copy_(total)
    return merged.view(tensors[0].shape)


class _Weighting:
    """Multiplies inputs by their weights, which may differ from vector to vector.

    Args:
        weights_Rn: Of each vector.
        vectors: Of the whole tensor.
    """

    def __init__(self, weights_Rn: torch.Tensor, vectors: Vectors) -> None:
        self._weights = weights_Rn
        self._vectors = vectors
        self._of_one = weights_Rn[0].tolist() if vectors.count == 1 else None

    def weigh(self, block: torch.Tensor, number: int, start: int) -> None:
        """Multiply a flat block of an input, in place.

        Args:
            block: See above.
            number: Of the input.
            start: Of the block, in the whole tensor.
        """
        if self._of_one is not None:
            block.mul_(self._of_one[number])
            return
        for entries, rows, shape in self._vectors.parts(start, start + len(block)):
            weights = self._weights[rows, number]
            weights = weights if self._vectors.are_columns else weights[:, None]
            block[entries].view(shape).mul_(weights)


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


def _block_size(tensor: torch.Tensor) -> int:
    """Entries of a block; rows of so many are aligned alike, on which bits of products depend."""
    size = _CPU_BLOCK if tensor.device.type == "cpu" else DEVICE_BLOCK
    stretches = max(1, -(-tensor.numel() // TILE_MULTIPLE))
    return min(size, stretches * TILE_MULTIPLE)


def _blocks(tensors: Sequence[torch.Tensor], size: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Blocks of flat tensors."""
    return zip(*(tensor.reshape(-1).split(size) for tensor in tensors), strict=True)


def _listed(origin: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return () if origin is None else (origin,)
