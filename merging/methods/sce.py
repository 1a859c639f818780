"""SCE: select the entries where experts differ most, weigh experts by energy, elect, average.

Source: Wan et al., "FuseChat: Knowledge Fusion of Chat Models", arXiv:2408.07990, section 3.3:
Select, Calculate, Erase.
Differences from the source: as in mergekit, the share is one of the entries whose variance is not
0; energies are means of squares, and experts weigh the same where these add up to less than 1e-6
(task vectors of rms under about 6e-4).

Needs the base model. Not separable: the selection is among all entries of a tensor.
Precision: task vectors in float32 (float64 if an input is), one rounding at the end.
Deterministic: yes; of equal variances at the threshold the lowest flat indices are selected.
Cost: a selection and 16 E N flops for E experts of N entries; E + 6 blocks of scratch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from merging.method import Cost, Geometry, MergeMethod, Staged, Step, Task, register
from merging.parameters import TouchParameters
from merging.sums import sum_of_tiles
from merging.thresholds import Thresholds

if TYPE_CHECKING:
    import torch

    from merging.ops.masks import Mask
    from merging.ops.quantiles import Row
    from merging.ops.selection import Rank
    from merging.ops.sparsify import KeepFromThresholds


class SceParameters(TouchParameters):
    """Recipe-level parameters."""

    select_topk: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description=(
            "Share of entries to merge, those with the largest variance over experts first; 1"
            " merges all, 0 gives the base."
        ),
    )
    int8_mask: bool = Field(
        default=False,
        description="Accepted for mergekit recipes; changes nothing, since no mask is ever stored.",
    )


def merge_sce(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor. Reports the experts' weights as figures."""
    from merging.ops.energies import find_variance, measure_energies
    from merging.ops.exact_sums import exact_sum
    from merging.ops.masks import Mask
    from merging.ops.sparsify import KeepFromThresholds, block_like

    assert base is not None
    tensors = list(experts)
    share = task.parameters.select_topk
    keep = mask = None
    if share < 1:
        threshold = find_variance(base, tensors, share)
        keep = KeepFromThresholds([threshold], block_like(base, tensors))
        mask = Mask(base.numel(), base.device)
    energies = measure_energies(base, tensors, keep, mask)
    return _merge_selected(base, tensors, task, [exact_sum(terms) for terms in energies], mask)


def finish_sce(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge the next tile of a tensor, with what passes have found."""
    assert base is not None
    tensors = list(experts)
    keep = _known_selection(base, tensors, task)
    return _merge_selected(base, tensors, task, task.given[-1].tolist(), keep)


def _merge_selected(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    task: Task,
    energies: Sequence[float],
    keep: KeepFromThresholds | Mask | None,
) -> torch.Tensor:
    from merging.ops.energies import merge_by_energy, weights_of

    num_entries = math.prod(task.shape) if task.shape else base.numel()
    weights = task.figures["expert_weights"] = weights_of(energies, num_entries)
    return merge_by_energy(base, experts, weights, keep, task.out)


def _known_selection(
    base: torch.Tensor, experts: Sequence[torch.Tensor], task: Task
) -> KeepFromThresholds | None:
    """From a threshold that passes have found; the same for all tiles of a tensor."""
    from merging.ops.quantiles import read_thresholds
    from merging.ops.selection import NONE
    from merging.ops.sparsify import KeepFromThresholds, block_like

    if not _selects(task.parameters):
        return None
    if "keep" not in task.memory:
        [found] = read_thresholds(task.given[1])
        threshold = found if found.value else NONE  # no variance was above 0
        task.memory["keep"] = KeepFromThresholds([threshold], block_like(base, experts))
    keep: KeepFromThresholds = task.memory["keep"]
    return keep


def _variances(
    base: torch.Tensor, experts: Iterator[torch.Tensor], _: Task
) -> Iterator[Row | None]:
    """Those above 0."""
    from merging.ops.energies import TaskVectors

    yield TaskVectors(base, list(experts)).variances_above_0


def _ranks(task: Task) -> list[Rank | None]:
    from merging.ops.energies import share_of_differing

    return [share_of_differing(task.parameters.select_topk)]


def _energies(base: torch.Tensor, experts: Sequence[torch.Tensor], task: Task) -> list[list[float]]:
    from merging.ops.energies import measure_energies

    return measure_energies(base, experts, _known_selection(base, experts, task))


def _selects(parameters: SceParameters) -> bool:
    return parameters.select_topk < 1


def sce_cost(geometry: Geometry, parameters: SceParameters) -> Cost:
    """Three passes over the task vectors, and a selection."""
    num_entries, num_experts = geometry.num_entries, geometry.num_experts
    selecting = num_entries // 4 + num_entries // (8 if geometry.on_host else 1)
    return Cost(
        flops=(24.0 * num_experts + 20) * num_entries,
        workspace_bytes=(selecting if _selects(parameters) else 0)
        + _block_bytes(geometry, parameters),
    )


def _pass_cost(geometry: Geometry, parameters: SceParameters) -> Cost:
    """One of them."""
    flops = (8.0 * geometry.num_experts + 6) * geometry.num_entries
    return Cost(flops, _block_bytes(geometry, parameters))


def _block_bytes(geometry: Geometry, _: SceParameters) -> int:
    return geometry.block_bytes(num_buffers=geometry.num_experts + 12)


_THRESHOLDS = Thresholds(
    name="",
    rows=_variances,
    ranks=_ranks,
    keeps_ties=lambda _: False,
    num_rows=lambda _: 1,
    cost=_pass_cost,
    needed=_selects,
)
_ENERGIES = sum_of_tiles(
    "energies", _energies, sums_per_expert=1, cost=_pass_cost, needed=lambda _: True
)

register(
    MergeMethod(
        name="sce",
        title="SCE (Select, Calculate, Erase)",
        summary=(
            "Selects the entries where the experts differ most, weighs experts by the size of their"
            " updates, and averages the entries that agree with an elected sign."
        ),
        source="Wan et al., FuseChat, arXiv:2408.07990, section 3.3",
        merge=merge_sce,
        cost=sce_cost,
        parameters=SceParameters,
        separable="whole",
        rounds=True,
        staged=Staged(
            reductions=(*_THRESHOLDS.reductions(), _ENERGIES),
            finish=Step(merge=finish_sce, cost=_pass_cost, rounds=True),
        ),
    )
)
