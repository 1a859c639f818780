"""Making experts of what is read for them: stored tensors, the base, adapters' factors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from merging.execute.pieces import Piece
from merging.plan.plan import Parts, Problem

if TYPE_CHECKING:
    import torch

    from merging.ops.low_rank import Adapter


class ExpertMaker:
    """Makes the experts of one piece after the other.

    An adapter's factors are read with the first piece of a tensor and kept for the others.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._adapters: dict[int, Adapter] = {}

    def make(
        self,
        piece: Piece,
        base: torch.Tensor | None,
        arriving: Iterator[torch.Tensor],
        *,
        expand: bool,
    ) -> Iterator[torch.Tensor]:
        """Yield the experts of a piece in recipe order.

        Args:
            piece: Which entries of which problem.
            base: These entries of the base, if it is read.
            arriving: What is read for the experts, flat, on the device.
            expand: An adapter of the base becomes a tensor; otherwise it is yielded as an
                :class:`~merging.ops.low_rank.Adapter` of the whole tensor as it is stored.
        """
        shape = piece.shape
        if not piece.problem.parts:
            yield from (flat.view(shape) for flat in arriving)
            return
        for number, parts in enumerate(piece.problem.parts):
            start = next(arriving).view(shape) if parts.is_stored else base
            if not parts.is_stored and not expand:
                # The method declares that it takes adapters among tensors.
                adapter = self._adapter(piece, number, parts, arriving)
                yield cast("torch.Tensor", adapter)
                continue
            assert start is not None, "the base is read where an expert starts from it"
            if parts.rank == 0:
                yield start
            else:
                expert = start.to(_work_dtype(piece.problem), copy=True)
                adapter = self._adapter(piece, number, parts, arriving)
                _add_entries(expert.view(-1), adapter, piece)
                yield expert

    def _adapter(
        self,
        piece: Piece,
        number: int,
        parts: Parts,
        arriving: Iterator[torch.Tensor],
    ) -> Adapter:
        if piece.start == 0:
            self._adapters[number] = _read_adapter(piece.problem, parts, self._device, arriving)
        return self._adapters.pop(number) if piece.is_last else self._adapters[number]


def _read_adapter(
    problem: Problem, parts: Parts, device: str, arriving: Iterator[torch.Tensor]
) -> Adapter:
    """An adapter of a stored tensor, in memory of its own; of rank 0 without a read."""
    import torch

    from merging.ops.low_rank import Adapter

    dtype = _work_dtype(problem)
    rows, columns = problem.input_shape[0], math.prod(problem.input_shape[1:])
    if parts.rank == 0:
        nothing = torch.empty(0, dtype=dtype, device=device)
        return Adapter(nothing.view(rows, 0), nothing.view(0, columns))
    first = next(arriving).to(dtype, copy=True)
    second = next(arriving).to(dtype, copy=True)
    if parts.flipped:
        up, down = first.view(parts.rank, rows).t(), second.view(columns, parts.rank).t()
    else:
        up, down = second.view(rows, parts.rank), first.view(parts.rank, columns)
    return Adapter(up, down, parts.scaling)


def _add_entries(flat: torch.Tensor, adapter: Adapter, piece: Piece) -> None:
    from merging.ops.precision import float32_products

    with float32_products(flat.device):
        flat.add_(adapter.entries(piece.start, piece.end))


def _work_dtype(problem: Problem) -> torch.dtype:
    """What adapters of a tensor are computed in: float64 if anything is stored in it."""
    import torch

    is_double = any(source.dtype == "F64" for source in problem.sources)
    return torch.float64 if is_double else torch.float32
