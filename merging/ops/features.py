"""Layers merged by what goes into them: sums over experts, one read at a time, and one solve.

Inputs alternate: an expert's tensor, its statistic (:mod:`merging.sampled`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from merging.ops.forms import MAX_DOUBLE_COLUMNS
from merging.ops.precision import float32_products

_REGRESSION_RIDGE = 1e-7


@dataclass(slots=True)
class FeatureSums:
    """Sums over the experts of a layer O×I.

    Attributes:
        weighted: Σ V_i H_i (O×I), V_i what is merged, of the expert.
        gram: Σ H_i (I×I).
        mean: (1/n) Σ V_i.
        rows: Of each expert, how many inputs were measured.
    """

    weighted: torch.Tensor
    gram: torch.Tensor
    mean: torch.Tensor
    rows: list[int]


def as_gram(statistic: torch.Tensor, width: int) -> tuple[torch.Tensor, int]:
    """XᵀX (I×I) of a statistic, in its type, and the number of rows of X.

    Args:
        statistic: Flat: XᵀX, or X and rows of zeros; behind it the number of rows.
        width: I.
    """
    values = statistic[:-1].view(-1, width)
    count = int(statistic[-1])
    return (values if len(values) == width else values.t() @ values), count


class StoredLayer(Protocol):
    """The tensor of a layer as :class:`merging.method.Task` tells of it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored."""

    @property
    def transposed(self) -> bool:
        """It is stored in×out."""


def _as_it_is(gram: torch.Tensor, _: int) -> torch.Tensor:
    return gram


def read_features(
    inputs: Iterator[torch.Tensor],
    layer: StoredLayer,
    *,
    base: torch.Tensor | None = None,
    treat: Callable[[torch.Tensor, int], torch.Tensor] = _as_it_is,
) -> FeatureSums:
    """Read a layer's experts and statistics.

    Args:
        inputs: Alternating, flat.
        layer: What they are of.
        base: V_i is the update of this tensor; None: the expert's weights.
        treat: What H_i is, of the Gram matrix and its number of rows.
    """
    sums: FeatureSums | None = None
    for tensor in inputs:
        work = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        value = tensor.view(layer.shape).to(work, copy=True)  # its memory goes with the next input
        if base is not None:
            value -= base.to(work)
        value = value.t() if layer.transposed else value
        with float32_products(value.device):
            gram, count = as_gram(next(inputs).to(work), value.shape[1])
            gram = treat(gram, count)
        if sums is None:
            zeros = torch.zeros_like(value, memory_format=torch.contiguous_format)
            sums = FeatureSums(zeros, torch.zeros_like(gram), zeros.clone(), [])
        with float32_products(value.device):
            sums.weighted.addmm_(value, gram)
        sums.gram.add_(gram)
        sums.mean.add_(value)
        sums.rows.append(count)
        del tensor, value, gram
    assert sums is not None, "recipes without experts are refused"
    sums.mean.div_(len(sums.rows))
    return sums


def is_measured(rows: Sequence[int], figures: dict[str, Any]) -> bool:
    """Whether something was measured in any expert; where it was not, that is reported.

    Args:
        rows: Of each expert.
        figures: Of the tensor's merge.
    """
    figures["rows"] = list(rows)
    unseen = sum(count == 0 for count in rows)
    if unseen:
        figures["warnings"] = [
            f"in {unseen} of {len(rows)} experts nothing is measured here, since too few tokens of"
            " their samples get there, or it is a norm of an unknown kind"
            + (": the others decide" if any(rows) else ": merged without samples")
        ]
    return any(rows)


def solve_ridge(sums: FeatureSums, ridge: float) -> torch.Tensor:
    """``(Σ V_i H_i + r mean(V)) (Σ H_i + r I)⁻¹`` with r = ridge · trace(Σ H_i)/I.

    The mean where nothing was measured. In float64 unless the layer is wide.
    """
    width = len(sums.gram)
    mean_energy = float(sums.gram.diagonal().double().sum()) / max(width, 1)
    if mean_energy <= 0:
        return sums.mean
    dtype = torch.float64 if width <= MAX_DOUBLE_COLUMNS else sums.gram.dtype
    pull = ridge * mean_energy
    matrix = sums.gram.to(dtype, copy=True)
    matrix.diagonal().add_(pull)
    right = torch.add(sums.weighted, sums.mean, alpha=pull).t().to(dtype)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:  # rounding of a sum of Gram matrices of which many directions are unseen
        solution = torch.linalg.solve(matrix, right)
    else:
        solution = torch.cholesky_solve(right, factor)
    transposed: torch.Tensor = solution.t()
    return transposed.to(sums.gram.dtype)


def solve_pinv(sums: FeatureSums, rtol: float | None) -> torch.Tensor:
    """``(Σ V_i H_i) (Σ H_i)⁺``; eigenvalues below ``rtol`` of the largest count as zero.

    Args:
        sums: Read to the end.
        rtol: None is the default of ``torch.linalg.pinv``, I times the type's epsilon.
    """
    with float32_products(sums.gram.device):
        inverse: torch.Tensor = torch.linalg.pinv(sums.gram, rtol=rtol)
        return sums.weighted @ inverse


def regression_mean(
    inputs: Iterator[torch.Tensor], layer: StoredLayer, alpha: float, figures: dict[str, Any]
) -> torch.Tensor:
    """RegMean's weights of a layer, as it is stored. Reports the samples' rows in ``figures``.

    Where the Gram matrices, of which all but the diagonals are scaled by ``alpha``, add up to a
    singular one, the mean of the weights (by a ridge of 1e-7 of the mean eigenvalue).

    Source: Jin et al., ICLR 2023, arXiv:2212.09849, eq. 3.
    """

    def shrink(H: torch.Tensor, count: int) -> torch.Tensor:
        diagonal = H.diagonal().clone()
        shrunk: torch.Tensor = H * alpha
        shrunk.diagonal().copy_(diagonal)
        return shrunk.div_(max(count, 1))

    sums = read_features(inputs, layer, treat=shrink)
    is_known = is_measured(sums.rows, figures)
    merged = solve_ridge(sums, _REGRESSION_RIDGE) if is_known else sums.mean
    return merged.t() if layer.transposed else merged


def mean_update(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], scale: float
) -> torch.Tensor:
    """``base + scale · mean(expert − base)``; the mean itself without a base.

    Elementwise, in float32 (float64 if an input is).
    """
    tensors = list(experts)
    everything = tensors if base is None else [base, *tensors]
    is_double = any(tensor.dtype == torch.float64 for tensor in everything)
    work = torch.float64 if is_double else torch.float32
    start = torch.zeros_like(tensors[0], dtype=work) if base is None else base.to(work)
    total = torch.zeros_like(start)
    for tensor in tensors:
        total.add_(tensor.to(work).sub_(start) if tensor.dtype != work else tensor - start)
    return total.div_(len(tensors)).mul_(scale).add_(start)
