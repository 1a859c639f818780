"""Linear combinations whose weights follow from the inner products of what is combined.

Interpolation on spheres, means on spheres and Model Stock all give a tensor in the span of their
inputs, with coefficients that depend on lengths and angles alone. So a tensor is read twice: once
for the n×n matrix of inner products (in float64, which makes nearly parallel inputs harmless), and
once for the sum. In between there is nothing but small matrices.

*Vectors* are whole tensors, or the rows of tensors, R of them: inner products are R×n×n, weights
R×n. With an origin, vectors are differences from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from merging.ops.blocks import block_size, blocks_of, result_for, work_dtype


def inner_products(
    tensors: Sequence[torch.Tensor], origin: torch.Tensor | None = None, *, by_rows: bool = False
) -> torch.Tensor:
    """Inner products of n tensors of one shape with one another.

    Args:
        tensors: Of any float dtype.
        origin: Subtracted from each, in the work dtype.
        by_rows: Rows (along the last dimension) are vectors, not whole tensors.

    Returns:
        R×n×n in float64, on the device of the tensors.
    """
    dtype = work_dtype((*tensors, *_listed(origin)))
    if not by_rows:
        return _whole_products(tensors, origin, dtype)
    views = [_vectors(tensor, by_rows=True) for tensor in (*tensors, *_listed(origin))]
    products = torch.zeros(
        (len(views[0]), len(tensors), len(tensors)), dtype=torch.float64, device=views[0].device
    )
    for block in _blocks(views[0]):
        parts = [view[block].to(dtype) for view in views]
        if origin is not None:
            start = parts.pop()
            parts = [part - start for part in parts]
        stacked = torch.stack(parts, dim=1).double()
        products[block[0]] += stacked @ stacked.mT
    return products


def _whole_products(
    tensors: Sequence[torch.Tensor], origin: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Inner products of whole tensors, 1×n×n, one by one: quicker than small matrices are."""
    count, device = len(tensors), tensors[0].device
    flat = [tensor.reshape(-1) for tensor in tensors]
    size = min(block_size(device), flat[0].numel())
    scratch = torch.empty((2, size), dtype=dtype, device=device)
    vectors = torch.empty((count, size), dtype=torch.float64, device=device)
    sums = [torch.zeros((), dtype=torch.float64, device=device)] * (count * (count + 1) // 2)
    pairs = list(itertools.combinations_with_replacement(range(count), 2))
    for block in blocks_of(flat[0].numel(), device):
        start, difference = scratch[:, : flat[0][block].numel()]
        if origin is not None:
            start.copy_(origin.reshape(-1)[block])
        parts = vectors[:, : start.numel()]
        for part, tensor in zip(parts, flat, strict=True):
            if origin is None:
                part.copy_(tensor[block])
            else:
                part.copy_(difference.copy_(tensor[block]).sub_(start))
        sums = [
            total + torch.dot(parts[i], parts[j]) for total, (i, j) in zip(sums, pairs, strict=True)
        ]
    products = torch.zeros((1, count, count), dtype=torch.float64, device=device)
    for total, (i, j) in zip(sums, pairs, strict=True):
        products[0, i, j] = products[0, j, i] = total
    return products


def combine(
    tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    origin: torch.Tensor | None = None,
    *,
    by_rows: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``origin + Σ weight · (tensor − origin)``, or the sum without an origin.

    Args:
        tensors: n tensors of one shape, of any float dtype.
        weights: R×n.
        origin: As for :func:`inner_products`, likewise ``by_rows``.
        by_rows: Each row has weights of its own.
        out: Flat, of any float dtype, for the result; by default new, float32 (float64 if an input
            is).

    Returns:
        Tensor of that shape.
    """
    dtype = work_dtype((*tensors, *_listed(origin)))
    views = [_vectors(tensor, by_rows=by_rows) for tensor in tensors]
    start = None if origin is None else _vectors(origin, by_rows=by_rows)
    merged = result_for(tensors[0], dtype, out).view(views[0].shape)
    size = min(block_size(merged.device), merged.numel())
    scratch = torch.empty((3, size), dtype=dtype, device=merged.device)
    weights = weights.to(dtype)
    for block in _blocks(merged):
        target = merged[block]
        total, term, begin = (flat[: target.numel()].view(target.shape) for flat in scratch)
        if start is not None:
            begin.copy_(start[block])
        total.zero_()
        for number, view in enumerate(views):
            term.copy_(view[block])
            if start is not None:
                term.sub_(begin)
            total.add_(term.mul_(weights[block[0], number, None]))
        if start is not None:
            total.add_(begin)
        target.copy_(total)
    return merged.reshape(tensors[0].shape)


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


def _vectors(tensor: torch.Tensor, *, by_rows: bool) -> torch.Tensor:
    """A view (or copy) of the tensor with one vector per row."""
    if by_rows and tensor.ndim > 1 and tensor.shape[-1]:
        return tensor.reshape(-1, tensor.shape[-1])
    return tensor.reshape(1, -1)


def _blocks(view: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Blocks of whole rows, or of parts of one row where rows are long."""
    num_rows, num_columns = view.shape
    size = block_size(view.device)
    row_step = max(1, size // max(1, num_columns))
    column_step = max(1, num_columns if row_step > 1 else size)
    for row in range(0, num_rows, row_step):
        for column in range(0, num_columns, column_step):
            yield slice(row, row + row_step), slice(column, column + column_step)


def _listed(origin: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return () if origin is None else (origin,)
