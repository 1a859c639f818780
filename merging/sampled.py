"""Methods that look at samples (docs/calibration.md): what their declarations have in common.

A method declares a step for linear layers (:data:`LINEAR`), and one for the scales of norms
(:data:`NORM`) if it has a rule for them. These get, for every expert in order, its tensor and what
was measured there, one at a time and both flat; ``task.shape`` has the tensor's shape. What is
measured at a linear layer of width I are the rows of its inputs: their Gram matrix (I×I) or, where
there can only be fewer than I, the rows themselves and zeros. At a norm these are the sums of
squares of its normalised inputs. Behind either stands the number of rows.

Nothing is measured at biases: a step for them (:data:`BIAS`) gets the experts alone, whole. Other
tensors are merged by the method's own function.

Instead of all these, a method may have a step for tensors with the diagonal of their Fisher
information (:data:`FISHER`): it gets every expert's tensor and that, of the same shape, in turns;
and as ``task.given``, of each expert, the Frobenius norm of the diagonals of all its tensors and
how many entries these have.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from merging.method import Cost, Geometry, MergeFunction, Step, Task

if TYPE_CHECKING:
    import torch

LINEAR = "linear"
NORM = "norm"
BIAS = "bias"
FISHER = "fisher"
_FLOAT_BYTES = 4


def by_expert(merge: MergeFunction) -> MergeFunction:
    """The step for layers that merges a mixture's experts in one tensor (E×O×I) one by one.

    Of such a tensor a statistic is those of all experts, one after the other, then their counts.
    All inputs are held. Reports are lists, with an entry for each expert of the mixture.
    """

    @functools.wraps(merge)
    def each(base: torch.Tensor | None, inputs: Iterator[torch.Tensor], task: Task) -> torch.Tensor:
        import torch

        if len(task.shape) < 3:
            return merge(base, inputs, task)
        count = task.shape[0]
        tensors, statistics = [], []
        for tensor in inputs:
            tensors.append(tensor.view(count, -1).clone())  # its memory goes with the next input
            statistics.append(next(inputs).clone())
        merged = []
        for number in range(count):
            own = dataclasses.replace(task, shape=task.shape[1:], figures={})
            mixed = [
                part
                for tensor, statistic in zip(tensors, statistics, strict=True)
                for part in (tensor[number], _of_expert(statistic, number, count))
            ]
            start = None if base is None else base.view(task.shape)[number]
            merged.append(merge(start, iter(mixed), own))
            for name, value in own.figures.items():
                if name == "warnings":
                    told = [f"expert {number} of the mixture: {text}" for text in value]
                    task.figures.setdefault(name, []).extend(told)
                else:
                    task.figures.setdefault(name, []).append(value)
        return torch.stack(merged)

    return each


def _of_expert(statistic: torch.Tensor, number: int, count: int) -> torch.Tensor:
    """The statistic of one expert of a mixture, as of a layer by itself."""
    import torch

    values = statistic[:-count].view(count, -1)[number]
    return torch.cat([values, statistic[len(statistic) - count + number].view(1)])


def held_entries(geometry: Geometry) -> int:
    """Numbers that :func:`by_expert` holds: all inputs, and the result."""
    if len(geometry.shape) < 3:
        return 0
    count, _, columns = geometry.shape
    num_experts = geometry.num_experts // 2
    return num_experts * (geometry.num_entries + count * columns**2) + 2 * geometry.num_entries


def layer_of(geometry: Geometry) -> Geometry:
    """Of one expert of a mixture whose experts are one tensor; else as it is."""
    if len(geometry.shape) < 3:
        return geometry
    return dataclasses.replace(geometry, shape=geometry.shape[1:])


def mean_cost(geometry: Geometry, _: Any) -> Cost:
    """The mean of updates: three buffers of the tensor's size."""
    entries = geometry.num_entries
    return Cost(2.0 * geometry.num_experts * entries, 3 * _FLOAT_BYTES * entries)


def features_cost(geometry: Geometry, _: Any) -> Cost:
    """Of each expert a product with its Gram matrix, once more to make that of rows; one solve.

    Half of what is read are statistics. Held: Σ V H, the mean, one expert and the right side in
    float64; the Gram matrices' sum, one more, and the solve's in float64.
    """
    rows, columns = layer_of(geometry).matrix
    num_experts = geometry.num_experts // 2
    sums = num_experts * (2.0 * rows * columns**2 + 2.0 * columns**3)
    solve = 9.0 * columns**3 + 2.0 * rows * columns**2
    entries = 8 * rows * columns + 8 * columns**2 + held_entries(geometry)
    layers = geometry.shape[0] if len(geometry.shape) > 2 else 1
    return Cost(layers * (sums + solve), _FLOAT_BYTES * entries)


def norm_cost(geometry: Geometry, _: Any) -> Cost:
    """A few vectors."""
    entries = geometry.num_entries
    return Cost(4.0 * geometry.num_experts * entries, 8 * _FLOAT_BYTES * entries)


def _regress(_: torch.Tensor | None, inputs: Iterator[torch.Tensor], task: Task) -> torch.Tensor:
    """The weight of a linear layer, by the method's ``alpha``. Reports the samples' rows."""
    from merging.ops.features import regression_mean

    return regression_mean(inputs, task, task.parameters.alpha, task.figures)


REGRESSION = Step(merge=_regress, cost=features_cost, separable="whole", streaming=True, flat=True)
"""RegMean's step for linear layers, whatever was run to measure them."""
