"""Fisher merging: the mean of the experts, weighted entry by entry by what each is sure of.

Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022,
arXiv:2111.09832, eq. 4. Of the diagonals F_i of the experts' Fisher information on their samples::

    W* = Σ_i a_i F_i W_i / Σ_i a_i F_i          (entry by entry)

    F_i = mean over samples x of  (∂ log p_i(y|x) / ∂W_i)²

log p_i(y|x) is the sum over the places of a sample of the next token's log-likelihood. Its labels y
are drawn from the model's own predictions at every place, for which F_i is an unbiased estimate of
the Fisher information; with ``calibration: {labels: given}`` they are the sample's next tokens (the
"empirical" Fisher). The seed of the merge decides what is drawn.

Differences from the source: where the number of classes is small the authors sum over all of them;
F_i is divided by the root mean square over all its entries (the authors: by the norm), and its
floor, 1e-6, is relative to that, so that nothing depends on the scale of the likelihood or on the
size of the model. a_i are given and not searched for.

Needs samples (docs/calibration.md), causal language models, and no base model.
Precision: gradients and sums in float32. Deterministic: yes.
Cost: a run of the samples forward, and one back that runs every block again; diagonals as large as
each expert in float32 are written and read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from merging.method import Cost, Geometry, MergeMethod, Step, Task, register
from merging.parameters import Parameters, TouchParameters
from merging.sampled import FISHER

if TYPE_CHECKING:
    import torch

_FLOAT_BYTES = 4


class FisherParameters(TouchParameters):
    """Recipe-level parameters."""

    normalize: bool = Field(
        default=True,
        description=(
            "Diagonals are divided by their root mean square over the model, so that experts weigh"
            " alike. Otherwise those that are surer of their predictions weigh more."
        ),
    )
    floor: float = Field(
        default=1e-6,
        gt=0,
        description=(
            "Least value of a diagonal's entry, relative to its root mean square: entries that no"
            " sample depends on are averaged. Much above 1 gives the plain mean."
        ),
    )


class FisherWeight(Parameters):
    """Parameters of an expert."""

    weight: float = Field(
        default=1.0, gt=0, description="a, the factor on this expert's Fisher information."
    )


def merge_fisher(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """A tensor without Fisher information, or a tile of one: the weighted mean."""
    import torch

    del base
    tensors = list(experts)
    weights = [expert.weight for expert in task.expert_parameters]
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    work = torch.float64 if is_double else torch.float32
    total = torch.zeros_like(tensors[0], dtype=work)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.to(work), alpha=weight / sum(weights))
    return total


def merge_weighted(
    base: torch.Tensor | None, inputs: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """A tensor or a tile of one, of which every expert's diagonal follows."""
    import torch

    del base
    tensors = list(inputs)
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    work = torch.float64 if is_double else torch.float32
    total, weights = (torch.zeros_like(tensors[0], dtype=work) for _ in range(2))
    for number, expert in enumerate(task.expert_parameters):
        norm, entries = task.given[number].tolist()
        mean_square = norm / entries**0.5 or 1.0
        diagonal = (
            (tensors[2 * number + 1] / mean_square).to(work).clamp_(min=task.parameters.floor)
        )
        diagonal *= expert.weight * (1.0 if task.parameters.normalize else mean_square)
        weights += diagonal
        total += diagonal.mul_(tensors[2 * number])
    return total.div_(weights)


def mean_cost(geometry: Geometry, _: Any) -> Cost:
    """Two sums and one expert's part."""
    entries = geometry.num_entries
    return Cost(4.0 * geometry.num_experts * entries, 5 * _FLOAT_BYTES * entries)


register(
    MergeMethod(
        name="fisher",
        title="Fisher merging",
        summary=(
            "The experts' mean, weighted entry by entry by the Fisher information of each: by how"
            " much its predictions on a few samples depend on the entry. Needs no base model."
        ),
        source="Matena and Raffel, NeurIPS 2022, arXiv:2111.09832, eq. 4",
        merge=merge_fisher,
        cost=mean_cost,
        parameters=FisherParameters,
        expert_parameters=FisherWeight,
        calibrated={FISHER: Step(merge=merge_weighted, cost=mean_cost)},
        needs_base=False,
        default_touch="all",
        default_rest="mean",
    )
)
