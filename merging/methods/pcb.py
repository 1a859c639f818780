"""PCB-Merging: entries that matter to their own task and agree with the others win.

Source: Du et al., "Parameter Competition Balancing for Model Merging", NeurIPS 2024,
arXiv:2410.02396, section 3, and the authors' code. With magnitudes |t| clamped to their own
quantiles 0.0001 and 0.9999 and m the same from 0 to 1, an entry's score is exp(E m²) tanh(t Σ t).
Each expert's scores from their quantile 1 - ``ratio`` to their largest become weights from 0 to 1,
and the update is the mean of the clamped task vectors with these weights. Quantiles are those of
whole models.
Differences from the source: negative scores, of entries that go against the sum of all, count as 0
before the quantile is taken (the same unless more than 1 - ``ratio`` of them are negative); what is
ranked may be a tensor; experts have weights.

Needs the base model. Not separable: quantiles depend on the whole model, or tensor.
Precision: task vectors in float32 (float64 if an input is), scores in float64 and ranked in
float32, one rounding at the end.
Deterministic: yes.
Cost: of the whole model five readings, two quantiles of |t| and two of the scores for each expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from merging.method import Cost, Geometry, MergeMethod, Staged, Step, Task, register
from merging.ops.blocks import elementwise_workspace
from merging.parameters import TaskVectorParameters, WeightParameters
from merging.thresholds import Thresholds

if TYPE_CHECKING:
    import torch

    from merging.ops.quantiles import Row
    from merging.ops.selection import Rank

_OUTLIERS = 0.0001
"""Share of the magnitudes that is clamped at either end."""


class PcbParameters(TaskVectorParameters):
    """Recipe-level parameters."""

    ratio: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description=(
            "Share of each expert's entries that take part, those of the highest score. The paper"
            " takes 0.05 to 0.2, and a λ of about 1.2."
        ),
    )
    scope: Literal["tensor", "global"] = Field(
        default="global",
        description=(
            "Of what 'ratio' is a share: of the whole model ('global', the paper), for which the"
            " models are read five times; or of each 'tensor'. With adapters alone the"
            " model is what they change."
        ),
    )


def merge_pcb(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor, ranked by itself."""
    assert base is not None
    tensors = list(experts)
    limits = MAGNITUDES.of_tensor(base, tensors, task)
    known = replace(task, given=(limits, limits))
    ranges = SCORES.of_tensor(base, tensors, known)
    return finish_pcb(base, iter(tensors), replace(task, given=(*known.given, ranges, ranges)))


def finish_pcb(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """Merge one tensor, or a tile of one, with quantiles that are known."""
    from merging.ops.competition import Competition

    assert base is not None
    return Competition(base, list(experts), _pairs(task, 1)).merge(
        _pairs(task, 3),
        [parameters.weight for parameters in task.expert_parameters],
        task.parameters.scale,
        base.shape,
    )


def _pairs(task: Task, number: int) -> list[tuple[float, float]]:
    """Both quantiles of each expert that were found."""
    from merging.ops.quantiles import read_thresholds

    found = [threshold.value for threshold in read_thresholds(task.given[number])]
    return list(zip(found[::2], found[1::2], strict=True))


def _magnitudes(
    base: torch.Tensor, experts: Iterator[torch.Tensor], _: Task
) -> Iterator[Row | None]:
    from merging.ops.quantiles import magnitudes

    for expert in experts:
        row = magnitudes(base, expert)
        yield row
        yield row


def _limits(task: Task) -> list[Rank | None]:
    """The places that the authors' code takes of D sorted numbers."""

    def low(size: int) -> int:
        return size - int(size * _OUTLIERS)

    def high(size: int) -> int:
        return size - int(size * (1 - _OUTLIERS) - 1)

    return [low, high] * len(task.expert_parameters)


def _scores(
    base: torch.Tensor, experts: Iterator[torch.Tensor], task: Task
) -> Iterator[Row | None]:
    from merging.ops.competition import Competition
    from merging.ops.quantiles import row_of

    for scores_N in Competition(base, list(experts), _pairs(task, 1)).all_scores():
        yield row_of(scores_N)
        yield row_of(scores_N)


def _ranges(task: Task) -> list[Rank | None]:
    def low(size: int) -> int:
        return max(1, size - int(size * (1 - task.parameters.ratio)))

    return [low, lambda _: 1] * len(task.expert_parameters)


def pcb_cost(geometry: Geometry, parameters: PcbParameters) -> Cost:
    """Scores of all experts at once, and four histograms for each."""
    scoring = _scoring_cost(geometry, parameters)
    return Cost(90.0 * geometry.num_experts * geometry.num_entries, scoring.workspace_bytes)


def _scoring_cost(geometry: Geometry, _: PcbParameters) -> Cost:
    num_entries, num_experts = geometry.num_entries, geometry.num_experts
    blocks = elementwise_workspace(num_entries, num_buffers=6)
    return Cost(30.0 * num_experts * num_entries, blocks + 4 * num_experts * num_entries)


def _finish_cost(geometry: Geometry, _: PcbParameters) -> Cost:
    num_entries, num_experts = geometry.num_entries, geometry.num_experts
    return Cost(
        flops=40.0 * num_experts * num_entries,
        workspace_bytes=elementwise_workspace(num_entries, num_buffers=6),
    )


def _group(parameters: PcbParameters, _: Sequence[WeightParameters]) -> Any:
    """Tensors of the whole model are ranked together where their share is the same."""
    return parameters.ratio if parameters.scope == "global" else None


MAGNITUDES = Thresholds(name="", rows=_magnitudes, ranks=_limits, num_rows=lambda n: 2 * n)
SCORES = Thresholds(
    name="score-", rows=_scores, ranks=_ranges, num_rows=lambda n: 2 * n, cost=_scoring_cost
)

register(
    MergeMethod(
        name="pcb",
        title="PCB-Merging",
        summary=(
            "Scores every entry of the task vectors by its weight in its own task and its agreement"
            " with the others, keeps the best and averages them by score."
        ),
        source="Du et al., NeurIPS 2024, arXiv:2410.02396, section 3",
        merge=merge_pcb,
        cost=pcb_cost,
        parameters=PcbParameters,
        expert_parameters=WeightParameters,
        separable="whole",
        staged=Staged(
            reductions=(*MAGNITUDES.reductions(), *SCORES.reductions()),
            finish=Step(merge=finish_pcb, cost=_finish_cost),
            group=_group,
        ),
    )
)
