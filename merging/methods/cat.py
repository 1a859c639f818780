"""CAT Merging: task arithmetic without what disturbs other tasks, by a few samples of each.

Source: Sun et al., "CAT Merging: A Training-Free Approach for Resolving Conflicts in Model
Merging", ICML 2025, arXiv:2505.06977. Of updates T_j = W_j − W0 and inputs X_j (tokens×I) of a
linear layer O×I, with H_j = X_jᵀX_j per token, every task i finds the directions of the output in
which the others disturb it most, beside λ times what they need of them themselves::

    Q_i = Σ_{j≠i} T_j (H_i − λ H_j) T_jᵀ        (O×O)
    b_i = eigenvectors of its c largest eigenvalues
    T_j ← (I − b_i b_iᵀ) T_j  for all i ≠ j, at the norm that T_j had

    norm scale, per channel:  z_i = Σ_{j≠i} t_j² (mean x̂_i² − λ mean x̂_j²); all t_j, j ≠ i, lose the
    channels where it is largest and keep their norm;   bias:  the same of z_i = Σ_{j≠i} t_j², and
    norms change

and everything is W0 + λ' Σ_j T_j; other tensors are not changed before that.

Differences from the source: inputs are those of the experts themselves, where the paper takes them
from W0 + λ' T_j, so that other methods' statistics serve; H_j is divided by its number of tokens,
so that a task with longer samples does not weigh more; every task's directions are found in updates
of which nothing was taken yet, so that they do not hang on the order of tasks; those of negative
eigenvalues are kept, whose removal costs more than it gives; an update of which nothing but
rounding is left is zero. A port of the authors' code takes the first columns of ``eigh``, the
*smallest* eigenvalues, against the derivation: ``eigenvalues: smallest`` does the same.

Needs the base model and samples (docs/calibration.md); two or three of each task are enough. All
experts and statistics of a layer are held at once.
Precision: products in float32 (float64 if an expert is), eigenvectors in float64 for up to 4096
rows; one rounding at the end. Deterministic: yes.
Cost: E² (4 O I² + 4 O² I) and E eigendecompositions of O×O, beside the run of the samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from merging.method import Cost, Geometry, MergeMethod, Step, Task, register
from merging.parameters import TouchParameters
from merging.sampled import BIAS, LINEAR, NORM, by_expert, held_entries, layer_of, mean_cost

if TYPE_CHECKING:
    import torch

_NOTHING = 1e-4
"""Of an update's norm: what removing all of it leaves in float32 is less."""

_FLOAT_BYTES = 4


class CatParameters(TouchParameters):
    """Recipe-level parameters."""

    scale: float = Field(
        default=0.4,
        description="λ', the factor on the sum of the trimmed updates before it is added.",
    )
    directions: (
        Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | Literal["all"]
    ) = Field(
        default=4,
        description=(
            "c, how many directions of a layer's output each task takes from the others. 'all':"
            " those that disturb it more than the others need them; between 0 and 1: the fewest of"
            " these with this share of their squared eigenvalues."
        ),
    )
    tradeoff: float = Field(
        default=5.0,
        ge=0,
        description="λ of linear layers: how much what a task needs itself protects its update.",
    )
    norm_channels: int = Field(
        default=4, ge=0, description="Channels of a norm's scale that each task takes from others."
    )
    norm_tradeoff: float = Field(default=10.0, ge=0, description="λ of norms' scales.")
    bias_channels: int = Field(
        default=4, ge=0, description="Entries of a bias that each task takes from the others."
    )
    eigenvalues: Literal["largest", "smallest"] = Field(
        default="largest",
        description=(
            "Which eigenvectors are the c directions: those of the 'largest' eigenvalues, as the"
            " paper derives it, or of the 'smallest', as in a port of the authors' code."
        ),
    )


def merge_cat(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """A tensor without a rule, or a tile of one: the sum of the updates, times λ'."""
    from merging.ops.features import mean_update

    tensors = list(experts)
    return mean_update(base, iter(tensors), task.parameters.scale * len(tensors))


def merge_linear(
    base: torch.Tensor | None, inputs: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """The weight of a linear layer.

    Reports the samples' rows, how many directions each task took from the others, and the update's
    norm.
    """
    from merging.ops.features import is_measured
    from merging.ops.precision import float32_products

    assert base is not None
    updates, statistics = _read(base, inputs, task)
    if not is_measured([int(statistic[-1]) for statistic in statistics], task.figures):
        return _add(base, sum(updates[1:], updates[0]), task)
    if task.transposed:
        updates = [update.t().contiguous() for update in updates]
    with float32_products(base.device):
        found = [
            _directions(_conflict(updates, statistics, number, task), task.parameters)
            for number in range(len(updates))
        ]
        total = updates[0].new_zeros(updates[0].shape)
        for number, update in enumerate(updates):
            trimmed = update.clone()
            for basis in (*found[:number], *found[number + 1 :]):
                trimmed -= basis @ (basis.t() @ trimmed)
            total += _with_norm_of(update, trimmed)
    task.figures["directions"] = [basis.shape[1] for basis in found]
    return _add(base, total.t() if task.transposed else total, task)


def merge_norm(
    base: torch.Tensor | None, inputs: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """The scale of a norm."""
    import torch

    from merging.ops.features import is_measured

    assert base is not None
    updates, statistics = _read(base, inputs, task)
    if not is_measured([int(statistic[-1]) for statistic in statistics], task.figures):
        return _add(base, sum(updates[1:], updates[0]), task)
    squares = torch.stack(updates).square()
    means = torch.stack([s[:-1] / s[-1].clamp(min=1) for s in statistics]).to(squares.dtype)
    own = task.parameters.norm_tradeoff * (squares * means)
    total = own.sum(0)
    conflicts = [
        (squares.sum(0) - squares[number]) * means[number] - (total - own[number])
        for number in range(len(updates))
    ]
    trimmed = _mask(updates, conflicts, task.parameters.norm_channels)
    kept = [_with_norm_of(*pair) for pair in zip(updates, trimmed, strict=True)]
    return _add(base, torch.stack(kept).sum(0), task)


def merge_bias(
    base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
) -> torch.Tensor:
    """A bias."""
    import torch

    assert base is not None
    updates = [_update(expert, base) for expert in experts]
    squares = torch.stack(updates).square()
    conflicts = [squares.sum(0) - own for own in squares]
    trimmed = _mask(updates, conflicts, task.parameters.bias_channels)
    return _add(base, torch.stack(trimmed).sum(0), task)


def _update(expert: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    import torch

    is_double = torch.float64 in (expert.dtype, base.dtype)
    work = torch.float64 if is_double else torch.float32
    return expert.view(base.shape).to(work) - base.to(work)


def _read(
    base: torch.Tensor, inputs: Iterator[torch.Tensor], task: Task
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """All updates, and what was measured at each."""
    updates, statistics = [], []
    for expert in inputs:
        updates.append(_update(expert, base.view(task.shape)))
        statistics.append(next(inputs))
    return updates, statistics


def _conflict(
    updates: Sequence[torch.Tensor], statistics: Sequence[torch.Tensor], number: int, task: Task
) -> torch.Tensor:
    """Q_i of one task, from O×I updates."""
    rows = len(updates[0])
    conflict = updates[0].new_zeros(rows, rows)
    for other, update in enumerate(updates):
        if other != number:
            conflict += _energy(update, statistics[number])
            conflict -= task.parameters.tradeoff * _energy(update, statistics[other])
    return conflict


def _energy(update: torch.Tensor, statistic: torch.Tensor) -> torch.Tensor:
    """T H Tᵀ per token (O×O), through rows of X where these are the statistic."""
    width = update.shape[1]
    values = statistic[:-1].view(-1, width).to(update.dtype)
    through = update @ values.t()
    energy = through @ (update if len(values) == width else through).t()
    return energy / max(float(statistic[-1]), 1.0)


def _directions(conflict: torch.Tensor, parameters: CatParameters) -> torch.Tensor:
    """b_i (O×c), orthonormal."""
    import torch

    from merging.ops.forms import MAX_DOUBLE_COLUMNS

    work = torch.float64 if len(conflict) <= MAX_DOUBLE_COLUMNS else conflict.dtype
    values, vectors = torch.linalg.eigh(((conflict + conflict.t()) / 2).to(work))
    least = len(values) * torch.finfo(torch.float32).eps * float(values.abs().max())
    num_positive = int((values > least).sum())
    count = parameters.directions
    if count == "all":
        count = num_positive
    elif count < 1:
        energies = values.flip(0)[:num_positive].square()
        reached = energies.cumsum(0) >= count * energies.sum()
        count = int((~reached).sum()) + 1
    if parameters.eigenvalues == "smallest":
        basis = vectors[:, : count if num_positive else 0]
    else:
        basis = vectors[:, len(values) - min(count, num_positive) :]
    chosen: torch.Tensor = basis.to(conflict.dtype)
    return chosen


def _mask(
    updates: Sequence[torch.Tensor], conflicts: Sequence[torch.Tensor], count: int
) -> list[torch.Tensor]:
    """The updates without the channels that other tasks take from them."""
    trimmed = [update.clone() for update in updates]
    for number, conflict in enumerate(conflicts):
        channels = conflict.argsort(descending=True, stable=True)[:count]
        for other, update in enumerate(trimmed):
            if other != number:
                update[channels] = 0
    return trimmed


def _with_norm_of(update: torch.Tensor, trimmed: torch.Tensor) -> torch.Tensor:
    """A trimmed update at its former norm; zero if only rounding is left of it."""
    before, after = float(update.double().norm()), float(trimmed.double().norm())
    return trimmed * (before / after if after > _NOTHING * before else 0.0)


def _add(base: torch.Tensor, total: torch.Tensor, task: Task) -> torch.Tensor:
    scale: float = task.parameters.scale
    update = total * scale
    task.figures["update_norm"] = float(update.double().norm())
    return update.add_(base.view(update.shape).to(update.dtype))


def linear_cost(geometry: Geometry, parameters: Any) -> Cost:
    """Half of what is read are statistics. Held: all updates, Q and its eigenvectors, the bases."""
    rows, columns = layer_of(geometry).matrix
    num_experts = geometry.num_experts // 2
    pairs = 2.0 * num_experts * max(num_experts - 1, 0)
    flops = pairs * (2.0 * rows * columns**2 + 2.0 * rows**2 * columns)
    flops += num_experts * 9.0 * rows**3
    count = parameters.directions
    width = min(count, rows) if isinstance(count, int) else rows
    entries = (num_experts + 4) * rows * columns + 12 * rows**2 + num_experts * rows * width
    layers = geometry.shape[0] if len(geometry.shape) > 2 else 1
    held = columns**2 + held_entries(geometry)
    return Cost(layers * flops, _FLOAT_BYTES * (entries + held))


def vector_cost(geometry: Geometry, _: Any) -> Cost:
    """Updates, their squares, what is known of each, conflicts and what is left."""
    entries = (5 * geometry.num_experts + 4) * geometry.num_entries
    return Cost(2.0 * entries, _FLOAT_BYTES * entries)


register(
    MergeMethod(
        name="cat",
        title="CAT Merging",
        summary=(
            "Task arithmetic without the directions of each task's updates that would disturb the"
            " other tasks most, found by a few unlabelled samples per expert."
        ),
        source="Sun et al., ICML 2025, arXiv:2505.06977",
        merge=merge_cat,
        cost=mean_cost,
        parameters=CatParameters,
        calibrated={
            LINEAR: Step(
                merge=by_expert(merge_linear), cost=linear_cost, separable="whole", flat=True
            ),
            NORM: Step(merge=merge_norm, cost=vector_cost, separable="whole", flat=True),
            BIAS: Step(merge=merge_bias, cost=vector_cost, separable="whole", flat=True),
        },
        default_touch="all",
        symmetric=False,
    )
)
