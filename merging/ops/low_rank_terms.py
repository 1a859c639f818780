"""A layer's problem in the main directions of each task vector, as OptMerge states it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from merging.ops.gram_form import GramProblem
from merging.ops.layers import new_task_vector, write_task_vector
from merging.ops.low_rank import Expert
from merging.ops.problem import norm_of
from merging.ops.truncation import truncate


def read_low_rank_terms(
    base: torch.Tensor, experts: Sequence[Expert], *, transposed: bool, center: bool
) -> GramProblem:
    """The problem Σ_i w_i ‖(M − T̂_i) P_iᵀ‖²_F of Wei et al. (ICLR 2026, arXiv:2505.19892).

    P_i is the part of T_i of rank K = ⌊min(O, I) / E⌋, at least 1, in its own coordinates. Task
    vectors that are zero take no part and are not counted in E.

    Args:
        base: Tensor of the base model.
        experts: Tensors of the experts or adapters of the tensor.
        transposed: They are stored in×out.
        center: T̂_i is the mean of the task vectors plus the part of rank K of T_i less the mean;
            else the part of rank K of T_i.
    """
    T = new_task_vector(base, experts[0], transposed=transposed)
    problem = GramProblem(T)
    for expert in experts:
        write_task_vector(T, base, expert, transposed=transposed)
        problem.norms.append(norm_of(T))
        problem.total.add_(T)
    num_nonzero = problem.num_nonzero
    if not num_nonzero:
        return problem
    rank = max(1, min(T.shape) // num_nonzero)
    mean = problem.total / num_nonzero if center else None
    for expert, norm in zip(experts, problem.norms, strict=True):
        if norm > 0:
            write_task_vector(T, base, expert, transposed=transposed)
            part = truncate(T, rank)
            directions = part.directions / norm
            if mean is None:
                target = part.left @ part.right
            else:
                part = truncate(T.sub_(mean), rank)
                target = torch.addmm(mean, part.left, part.right)
            problem.add_term(target, directions)
    return problem
