"""Methods that thin task vectors out before they add them up, with TIES' election or without it.

DARE, Model Breadcrumbs and DELLA come in both forms; here is what the two have in common.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from merging.method import Cost, Geometry, Staged, Step, Task
from merging.norms import norms_pass, with_known_norms
from merging.parameters import WeightParameters
from merging.thresholds import Thresholds

if TYPE_CHECKING:
    import torch

    from merging.ops.bands import KeepBand
    from merging.ops.by_rank import KeepByRank
    from merging.ops.norms import Norms
    from merging.ops.quantiles import Row
    from merging.ops.selection import Rank
    from merging.ops.task_vectors import Sparsify

_SORTED_BYTES = 56
"""Of an entry while its row is sorted; rows that are shorter than a block are sorted together."""


class RandomShareParameters(WeightParameters):
    """Parameters of an expert for DARE."""

    density: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description=(
            "Probability that an entry of the task vector is kept (1 − the paper's drop rate p)."
            " Large models bear 0.1 to 0.5; 1 drops nothing."
        ),
    )


class BandParameters(WeightParameters):
    """Parameters of an expert for Model Breadcrumbs."""

    density: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description=(
            "Share of the task vector's entries to keep in each tensor. The paper keeps about 0.9;"
            " 1 drops nothing."
        ),
    )
    gamma: float = Field(
        default=0.01,
        ge=0,
        lt=1,
        description="Share of the largest entries to drop, as outliers, where density is under 1.",
    )


class ByRankParameters(WeightParameters):
    """Parameters of an expert for DELLA."""

    density: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Mean probability that an entry of the task vector is kept; 1 drops nothing.",
    )
    epsilon: float = Field(
        default=0.15,
        ge=0,
        lt=0.5,
        description=(
            "The largest entry of a row is kept with probability density + epsilon, the smallest"
            " with density - epsilon; both must lie between 0 and 1 where density is under 1."
        ),
    )

    @model_validator(mode="after")
    def _check_probabilities(self) -> Self:
        low, high = self.density - self.epsilon, self.density + self.epsilon
        if self.density < 1 and not (low > 0 and high < 1):
            raise ValueError(
                f"density ± epsilon gives probabilities from {low:g} to {high:g}, which must lie"
                " between 0 and 1: make epsilon smaller"
            )
        return self


def merge_random_share(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task, *, elect_signs: bool
) -> torch.Tensor:
    """DARE: a random share of each task vector."""
    from merging.ops.sparsify import KeepRandom

    assert base is not None
    keep = KeepRandom(
        [parameters.density for parameters in task.expert_parameters],
        rescale=task.parameters.rescale,
        seed=task.seed,
        tensor_name=task.tensor_name,
        offset=task.offset,
        device=base.device,
    )
    return _combine(base, list(experts), task, keep, elect_signs=elect_signs)


def merge_band(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task, *, elect_signs: bool
) -> torch.Tensor:
    """Model Breadcrumbs: neither the smallest nor the very largest entries."""
    from merging.ops.bands import KeepBand
    from merging.ops.norms import RestoreNorms, factors_of, measure_norms

    assert base is not None
    tensors = list(experts)
    densities = [parameters.density for parameters in task.expert_parameters]
    gammas = [parameters.gamma for parameters in task.expert_parameters]
    band = KeepBand.of_tensor(base, tensors, densities, gammas)
    keep: Sparsify = band
    if task.parameters.rescale:
        norms = measure_norms(base, tensors, band.afresh())
        keep = RestoreNorms(band, factors_of(norms))
    return _combine(base, tensors, task, keep, elect_signs=elect_signs)


def merge_by_rank(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task, *, elect_signs: bool
) -> torch.Tensor:
    """DELLA: a random share of each task vector, large entries more likely."""
    from merging.ops.norms import RestoreNorms, factors_of

    assert base is not None
    tensors = list(experts)
    by_rank = _keep_by_rank(base, tensors, task)
    keep: Sparsify = by_rank
    if task.parameters.rescale:
        keep = RestoreNorms(by_rank, factors_of(by_rank.norms))
    return _combine(base, tensors, task, keep, elect_signs=elect_signs)


def _keep_by_rank(base: torch.Tensor, experts: Sequence[torch.Tensor], task: Task) -> KeepByRank:
    """Of a tensor or whole rows of it."""
    from merging.ops.by_rank import KeepByRank
    from merging.ops.sparsify import KeepRandom

    random = KeepRandom(
        [parameters.density for parameters in task.expert_parameters],
        rescale=False,
        seed=task.seed,
        tensor_name=task.tensor_name,
        offset=0,
        device=base.device,
    )
    shape = task.shape or base.shape
    columns = math.prod(shape[1:]) if len(shape) > 1 else base.numel()
    first, *others = (tensor.reshape(-1, max(1, columns)) for tensor in (base, *experts))
    return KeepByRank(first, others, task.expert_parameters, random, task.offset)


def _combine(
    base: torch.Tensor,
    experts: list[torch.Tensor],
    task: Task,
    keep: Sparsify,
    *,
    elect_signs: bool,
) -> torch.Tensor:
    from merging.ops.task_vectors import combine_task_vectors

    return combine_task_vectors(
        base,
        experts,
        [parameters.weight for parameters in task.expert_parameters],
        scale=task.parameters.scale,
        normalize=task.parameters.normalize,
        elect_signs=elect_signs,
        sparsify=keep,
        out=task.out,
    )


def band_cost(geometry: Geometry, parameters: Any) -> Cost:
    """Selection looks at each magnitude a few times; the rest is a dozen operators per entry."""
    num_entries, num_experts = geometry.num_entries, geometry.num_experts
    return Cost(
        flops=(60.0 if parameters.rescale else 40.0) * num_experts * num_entries,
        workspace_bytes=num_entries // 4 + geometry.block_bytes(num_buffers=num_experts + 10),
    )


def by_rank_cost(geometry: Geometry, parameters: Any) -> Cost:
    """Sorting takes a dozen operators' time per entry; what is kept is held, a bit or byte each."""
    del parameters
    num_entries, num_experts = geometry.num_entries, geometry.num_experts
    shape = geometry.tiled_shape or geometry.shape
    columns = max(1, math.prod(shape[1:]) if len(shape) > 1 else num_entries)
    return Cost(
        flops=60.0 * num_experts * num_entries,
        workspace_bytes=num_experts * num_entries // (8 if geometry.on_host else 1)
        + geometry.block_bytes(num_buffers=num_experts + 18)
        + _SORTED_BYTES * columns,
    )


def band_passes(*, elect_signs: bool) -> Staged:
    """Model Breadcrumbs of a tensor in tiles: thresholds, norms if they are restored, the merge."""

    def finish(
        base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
    ) -> torch.Tensor:
        assert base is not None
        tensors = list(experts)
        keep = with_known_norms(_known_band(base, tensors, task), task)
        return _combine(base, tensors, task, keep, elect_signs=elect_signs)

    return Staged(
        reductions=(*_BANDS.reductions(), norms_pass(_band_norms, band_cost)),
        finish=Step(merge=finish, cost=band_cost, rounds=True),
    )


def by_rank_passes(*, elect_signs: bool) -> Staged:
    """DELLA of a tensor in tiles of whole rows: norms if they are restored, the merge."""

    def finish(
        base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
    ) -> torch.Tensor:
        assert base is not None
        tensors = list(experts)
        keep = with_known_norms(_keep_by_rank(base, tensors, task), task)
        return _combine(base, tensors, task, keep, elect_signs=elect_signs)

    return Staged(
        reductions=(norms_pass(_by_rank_norms, by_rank_cost, by_row=True),),
        finish=Step(merge=finish, cost=by_rank_cost, rounds=True, by_row=True),
    )


def _by_rank_norms(base: torch.Tensor, experts: Sequence[torch.Tensor], task: Task) -> list[Norms]:
    return _keep_by_rank(base, experts, task).norms


def _band_norms(base: torch.Tensor, experts: Sequence[torch.Tensor], task: Task) -> list[Norms]:
    from merging.ops.norms import measure_norms

    return measure_norms(base, experts, _known_band(base, experts, task))


def _known_band(base: torch.Tensor, experts: Sequence[torch.Tensor], task: Task) -> KeepBand:
    """From thresholds that passes have found; the same for all tiles of a tensor."""
    from merging.ops.bands import KeepBand
    from merging.ops.quantiles import read_thresholds
    from merging.ops.sparsify import block_like

    if "band" not in task.memory:
        found = read_thresholds(task.given[1])
        has_band = [parameters.density < 1 for parameters in task.expert_parameters]
        pairs = list(zip(found[::2], found[1::2], strict=True))
        task.memory["band"] = KeepBand(pairs, block_like(base, experts), has_band)
    band: KeepBand = task.memory["band"]
    return band


def _band_rows(
    base: torch.Tensor, experts: Iterator[torch.Tensor], task: Task
) -> Iterator[Row | None]:
    from merging.ops.quantiles import magnitudes

    for expert, parameters in zip(experts, task.expert_parameters, strict=True):
        row = magnitudes(base, expert) if parameters.density < 1 else None
        yield row
        yield row


def _band_ranks(task: Task) -> list[Rank | None]:
    from merging.ops.bands import band_ranks

    pairs = (band_ranks(own.density, own.gamma) for own in task.expert_parameters)
    return [rank for pair in pairs for rank in pair]


_BANDS = Thresholds(
    name="",
    rows=_band_rows,
    ranks=_band_ranks,
    keeps_ties=lambda _: False,
    num_rows=lambda num_experts: 2 * num_experts,
)
