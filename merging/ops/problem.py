"""The problem behind WUDI: what the task vectors of a linear layer say about their merger.

WUDI merges a layer's task vectors T_i (O×I) into one update M by making its interference small
(Cheng et al., ICML 2025, arXiv:2503.08099, eq. 21)::

    L(M) = Σ_i w_i ‖(M − T_i) T_iᵀ‖²_F ,   w_i = 1 / ‖T_i‖²_F

Multiplied out it is a quadratic in M, with a gradient of one matrix product on either side::

    L(M) = ⟨M A, M⟩ − 2 ⟨M, B⟩ + c ,   ½ ∇L(M) = M A − B
    A = Σ w_i T_iᵀT_i  (I×I)     B = Σ w_i T_i T_iᵀT_i  (O×I)     c = Σ w_i ‖T_iᵀT_i‖²_F

so nothing is left of the experts but sums. The trace of A is the number of task vectors that are
not zero: A has no unit, whatever the size of the task vectors.

There are three forms of it, :mod:`merging.ops.gram_form`, :mod:`merging.ops.row_form` and, for
adapters, :mod:`merging.ops.low_rank`; :mod:`merging.ops.forms` finds the cheapest. Solvers that
need the right side only through functions of A (closed forms and spectral filters) run in a form's
*coordinates*: on X, which :meth:`LayerProblem.store` expands to M.

Precision: task vectors are formed in the work dtype (inputs are raised first, then subtracted) and
normalised before they are multiplied, so that nothing over- or underflows at any scale.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch

from merging.ops.blocks import inner_product
from merging.ops.forms import Form
from merging.ops.precision import Precision

Known = TypeVar("Known")

HalfGradient = Callable[[torch.Tensor, torch.Tensor], None]
"""``half_gradient(M_rows, out)`` writes the rows of M A − B that belong to these rows of M."""


class SolveError(Exception):
    """A problem that cannot be solved with these parameters; the text says why."""


def norm_of(T: torch.Tensor) -> float:
    """‖T‖_F of a task vector (contiguous).

    Raises:
        SolveError: It is not finite: nothing that is solved with it would mean anything.
    """
    norm = math.sqrt(inner_product(T, T))
    if not math.isfinite(norm):
        raise SolveError("a task vector holds values that are not finite")
    return norm


class LayerProblem(ABC):
    """A layer's problem, which has been read or is being summed up.

    Args:
        like: A matrix of the layer's shape (O×I), in the work dtype, on the device to work on.

    Attributes:
        form: How it is written.
        A: The symmetric matrix of the quadratic, in coordinates.
        B: The right-hand side, in coordinates.
        num_columns: I of the layer, also where coordinates have fewer.
        total: Σ T_i (O×I).
        c: The loss of an update of zeros.
        norms: ‖T_i‖_F of every expert, zero or not.
        gram_squares: ‖T_iᵀT_i‖²_F / ‖T_i‖⁴_F of every expert that takes part: 1 if its rank is 1,
            1 over the rank if its singular values are equal.
    """

    form: ClassVar[Form]
    A: torch.Tensor
    B: torch.Tensor

    def __init__(self, like: torch.Tensor) -> None:
        self.num_columns = like.shape[1]
        self.total = torch.zeros_like(like)
        self.c = 0.0
        self.norms: list[float] = []
        self.gram_squares: list[float] = []
        self._known: dict[Any, Any] = {}

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
        return math.sqrt(sum(squares) / max(1, len(squares) * self.total.numel()))

    def once(self, compute: Callable[[LayerProblem], Known]) -> Known:
        """What a function says of the problem as it was read; computed once, for all variants."""
        if compute not in self._known:
            self._known[compute] = compute(self)
        known: Known = self._known[compute]
        return known

    def row_blocks(self, row_block: int) -> list[slice]:
        """All rows in blocks of so many, the last of which may be shorter; 0 means one block."""
        num_rows = self.total.shape[0]
        size = min(row_block or num_rows, num_rows)
        return [slice(at, min(at + size, num_rows)) for at in range(0, num_rows, max(1, size))]

    @abstractmethod
    def combine(self, power: int, rows: slice) -> torch.Tensor:
        """Rows of Σ ‖T_i‖^power · T_i / ‖T_i‖ over the experts that take part, in coordinates.

        1 gives the sum of the task vectors, -1 the one with weights w_i. Not to be changed.
        """

    @abstractmethod
    def store(self, rows: slice, X_rows: torch.Tensor) -> None:
        """Write the update with these coordinates over rows of ``total``.

        A solver that goes through the rows of a problem once needs no second matrix of its size.
        """

    @abstractmethod
    def half_gradient(self, rows: slice, precision: Precision) -> HalfGradient:
        """A function that computes these rows of M A − B again and again, in the same buffers."""

    @abstractmethod
    def loss(self, M: torch.Tensor) -> float:
        """L(M) of an update (O×I)."""


class DenseProblem(LayerProblem):
    """A problem that is summed up from dense task vectors, one by one in recipe order."""

    def accumulate(self, T: torch.Tensor) -> None:
        """Add one task vector (contiguous, O×I); its memory is used as scratch.

        A zero one has no weight and takes no part.
        """
        norm = norm_of(T)
        self.norms.append(norm)
        if norm == 0:
            return
        self.total.add_(T)
        self._add(T.div_(norm), norm)

    @abstractmethod
    def finish(self) -> None:
        """To be called after the last task vector, before anything is solved."""

    @abstractmethod
    def _add(self, T: torch.Tensor, norm: float) -> None:
        """Add a normalised task vector."""

    def _note_gram(self, gram: torch.Tensor, norm: float) -> None:
        """Add what the Gram matrix of a normalised task vector, of either side, says of it."""
        square = inner_product(gram, gram)
        self.gram_squares.append(square)
        self.c += norm * norm * square
