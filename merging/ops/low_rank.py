"""Adapters: a layer's problem solved on small cores, without a dense task vector.

Task vectors T_i = c_i B_i A_i of adapters (B_i: O×R_i, A_i: R_i×I, c_i the adapter's scaling) have
all rows in the span of the stacked A_i and all columns in that of the stacked B_i. With orthonormal
bases Q (I×N) and U (O×N) of these, T_i = U C_i Qᵀ with cores C_i = c_i (Uᵀ B_i) (A_i Q) of at most
N = Σ R_i rows and columns. A solver that turns with its input, f(U T Qᵀ) = U f(T) Qᵀ, gives on the
cores what it gives on the dense matrices: the closed form and all spectral filters do, Adam does
not (it works entry by entry, and leaves the span). The result is an adapter again.

Cost: 2 (O + I) N² for the bases and the solver's on N×N, in place of its cost on O×I.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from merging.ops.gram_form import GramProblem
from merging.ops.layers import Solve


class Adapter(NamedTuple):
    """``scaling · up @ down``, in the names of the LoRA paper B and A.

    Attributes:
        up: O×R.
        down: R×I.
        scaling: ``lora_alpha / r``, or ``lora_alpha / √r`` of rank-stabilised adapters.
    """

    up: torch.Tensor
    down: torch.Tensor
    scaling: float = 1.0


def solve_adapters(adapters: Sequence[Adapter], solve: Solve) -> Adapter:
    """Merge adapters of one layer, of any ranks.

    Args:
        adapters: In recipe order, all in the dtype to work in. An expert without an adapter on this
            layer is left out.
        solve: Solution of a problem; one that turns with its input (see the module's text). Its
            problem can be combined with weights w_i too.

    Returns:
        The merged update, of rank N at most.
    """
    U = torch.linalg.qr(torch.cat([adapter.up for adapter in adapters], dim=1)).Q
    Q = torch.linalg.qr(torch.cat([adapter.down for adapter in adapters]).t()).Q
    like = U.new_empty((U.shape[1], Q.shape[1]))
    problem = GramProblem(like, keep_weighted_total=True, num_columns=len(Q))
    for adapter in adapters:
        core = (U.t() @ adapter.up) @ (adapter.down @ Q)
        problem.accumulate(core.mul_(adapter.scaling))
    problem.finish()
    core = solve(problem) if problem.num_nonzero > 1 else problem.total
    return Adapter(U @ core, Q.t())
