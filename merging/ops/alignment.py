"""KnOTS: task vectors in a common basis of their outputs, where entries can be compared.

Of the decomposition U S [V_1 … V_n]ᵀ of the task vectors side by side (O×nI), U is the basis and
C_i = S V_iᵀ = Uᵀ T_i what a task vector is in it. So U is all that is needed: the eigenvectors of
Σ T_i T_iᵀ (O×O), in float64, which leaves as many digits as float32 has to begin with. Adapters are
in the span of their up-projections: there the matrix has as many rows as they have ranks.

Shapes: task vectors T_i are O×I, the basis O×R.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from merging.ops.layers import as_layer, read_task_vectors
from merging.ops.low_rank import Adapter, Expert
from merging.ops.spectral import eigh

_CUT = 1e-6
"""Directions whose singular value is a smaller share of the largest are rounding."""

_COLUMNS = 4096
"""Raised to float64 at a time."""


def align(
    base: torch.Tensor, experts: Iterator[Expert], *, transposed: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The basis U (O×R), and the C_i (R×I).

    Source: Stoica et al., "Model Merging with SVD to Tie the Knots", ICLR 2025, arXiv:2410.19735,
    section 4.

    Args:
        base: Tensor of the base model.
        experts: Tensors of the experts, or adapters of the tensor.
        transposed: Tensors are stored in×out.

    Raises:
        SolveError: The decomposition failed.
    """
    listed = list(experts)
    adapters = [as_layer(e, transposed=transposed) for e in listed if isinstance(e, Adapter)]
    if len(adapters) < len(listed):
        vectors = read_task_vectors(base, iter(listed), transposed=transposed)
        basis = _output_basis(vectors)
    else:
        span = torch.linalg.qr(torch.cat([adapter.up for adapter in adapters], dim=1)).Q
        vectors = [(span.mT @ a.up).mul_(a.scaling) @ a.down for a in adapters]
        inner = _output_basis(vectors)
        basis = span @ inner
        return basis, [inner.mT @ T for T in vectors]
    for number, T in enumerate(vectors):
        vectors[number] = basis.mT @ T  # one at a time, in the place of the task vector
    return basis, vectors


def _output_basis(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Left singular vectors of matrices side by side, largest singular value first."""
    rows = len(vectors[0])
    gram = torch.zeros((rows, rows), dtype=torch.float64, device=vectors[0].device)
    for T in vectors:
        for part in T.split(_COLUMNS, dim=1):
            columns = part.double()
            gram.addmm_(columns, columns.mT)
    values, basis = eigh(gram)
    count = int((values > _CUT**2 * values[-1:]).sum())
    return basis[:, len(values) - count :].flip(1).to(vectors[0].dtype)
