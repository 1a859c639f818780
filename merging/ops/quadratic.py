"""The quadratic behind WUDI: what n task vectors of a linear layer say about their merger.

WUDI merges a layer's task vectors T_i (O×I) into one update M by making its interference small
(Cheng et al., ICML 2025, arXiv:2503.08099, eq. 21)::

    L(M) = Σ_i w_i ‖(M − T_i) T_iᵀ‖²_F ,   w_i = 1 / ‖T_i‖²_F

Multiplied out, it depends on the task vectors through two sums and a number only::

    L(M) = ⟨M A, M⟩ − 2 ⟨M, B⟩ + c
    A = Σ w_i T_iᵀT_i  (I×I)     B = Σ w_i T_i T_iᵀT_i  (O×I)     c = Σ w_i ‖T_iᵀT_i‖²_F

so experts are read once, one at a time, and a gradient costs one product whatever their number.

Precision: task vectors are formed in the work dtype (inputs are raised first, then subtracted) and
normalised before they are multiplied, so that nothing over- or underflows at any scale. c cancels
against the rest: losses below about 1e-6 of c are rounding.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from merging.ops.blocks import block_size, inner_product

_LOSS_NOISE = 1e-6
"""Share of c below which a float32 loss says nothing."""


class QuadraticProblem:
    """A, B and c of one layer, summed up expert by expert in recipe order.

    Args:
        like: A matrix of the layer's shape (O×I), in the work dtype, on the device to work on.
        keep_weighted_total: Sum up Σ w_i T_i too.

    Attributes:
        A: Σ w_i T_iᵀT_i; its trace is the number of task vectors that are not zero.
        B: Σ w_i T_i T_iᵀT_i.
        total: Σ T_i.
        weighted_total: Σ w_i T_i, or None if it was not asked for.
        c: Σ w_i ‖T_iᵀT_i‖²_F.
        norms: ‖T_i‖_F of every expert.
    """

    def __init__(self, like: torch.Tensor, *, keep_weighted_total: bool = False) -> None:
        self.A = like.new_zeros((like.shape[1], like.shape[1]))
        self.B = torch.zeros_like(like)
        self.total = torch.zeros_like(like)
        self.weighted_total = torch.zeros_like(like) if keep_weighted_total else None
        self.c = 0.0
        self.norms: list[float] = []

    @property
    def nonzero_norms(self) -> list[float]:
        """Norms of the task vectors that take part."""
        return [norm for norm in self.norms if norm > 0]

    @property
    def num_nonzero(self) -> int:
        """How many task vectors take part."""
        return len(self.nonzero_norms)

    @property
    def rms(self) -> float:
        """Root mean square of the entries of all task vectors that take part."""
        squares = [norm * norm for norm in self.nonzero_norms]
        return math.sqrt(sum(squares) / max(1, len(squares) * self.B.numel()))

    @property
    def weight_sum(self) -> float:
        """Σ w_i."""
        return sum(1 / (norm * norm) for norm in self.nonzero_norms)

    def accumulate(self, T: torch.Tensor) -> None:
        """Add one task vector (contiguous, O×I); its memory is used as scratch.

        A zero one has no weight and takes no part.
        """
        norm = math.sqrt(inner_product(T, T))
        self.norms.append(norm)
        if norm == 0:
            return
        self.total.add_(T)
        T.div_(norm)
        gram = T.t() @ T
        self.A.add_(gram)
        self.B.addmm_(T, gram, alpha=norm)
        self.c += norm * norm * inner_product(gram, gram)
        if self.weighted_total is not None:
            self.weighted_total.add_(T, alpha=1 / norm)

    def loss(self, M: torch.Tensor) -> float:
        """L(M), with a workspace of a few rows."""
        num_rows = max(64, block_size(M.device) // max(1, M.shape[1]))
        loss = self.c
        for M_rows, B_rows in zip(M.split(num_rows), self.B.split(num_rows), strict=True):
            loss += inner_product(M_rows, torch.addmm(B_rows, M_rows, self.A, beta=-2))
        return max(0.0, loss)

    def describe_start(self) -> dict[str, Any]:
        """Figures of the task vectors and of their plain sum, for the merge report."""
        figures: dict[str, Any] = {
            "expert_norms": self.norms,
            "sum_norm": math.sqrt(inner_product(self.total, self.total)),
        }
        if nonzero := self.nonzero_norms:
            figures["norm_spread"] = max(nonzero) / min(nonzero)
        if len(nonzero) > 1:
            figures["loss_before"] = self.loss(self.total)
        return figures

    def describe_solution(self, M: torch.Tensor, start: dict[str, Any]) -> dict[str, Any]:
        """Figures of a merged update, beside :meth:`describe_start`'s."""
        figures: dict[str, Any] = {"update_norm": math.sqrt(inner_product(M, M))}
        if start["sum_norm"] > 0:
            figures["norm_ratio"] = figures["update_norm"] / start["sum_norm"]
        if "loss_before" in start:
            figures["loss_after"] = self.loss(M)
            if start["loss_before"] > _LOSS_NOISE * self.c:
                figures["interference_removed"] = 1 - figures["loss_after"] / start["loss_before"]
        return figures
