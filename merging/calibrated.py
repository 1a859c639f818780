"""Methods whose update of a layer is put to scale by one rule for the whole model.

The scale of spectral methods is tuned on validation data in their papers. In its place a rule: with
p = (1/n) Σ_i ⟨U, T_i⟩ / ‖T_i‖²_F, the share of each task vector's own direction that survives in a
layer's update U, the scale is the mean over layers of 1/p (those with p ≤ 0 left out), so that on
average the whole of every task vector is kept. It depends on all layers: a first pass over the
models leaves each layer's update and p in intermediate files, a second one adds them to the base.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from merging.method import Cost, Geometry, MergeFunction, Reduction, Staged, Step, Task

if TYPE_CHECKING:
    import torch

    from merging.ops.calibration import Calibration

CalibratedScale = Annotated[
    float | Literal["calibrated"],
    Field(
        description=(
            "Factor on the update before it is added to the base. 'calibrated' follows a rule, one"
            " factor for the whole model, at which the task vectors are kept whole on average; the"
            " report has it."
        )
    ),
]
"""The parameter of methods that have an :class:`UpdateRule`."""

_NUM_FIGURES = 8
"""Fields of :class:`merging.ops.calibration.Calibration`."""


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """How a method finds the update of a layer. Its parameters have a ``scale``.

    Attributes:
        find: The update, in the shape of the tensor, and its calibration; as a method's function.
        cost: Of that.
        streaming: Experts are read one at a time.
        calibrated: The value of ``scale`` that asks for the rule.
    """

    find: Callable[..., tuple[torch.Tensor, Calibration]]
    cost: Callable[[Geometry, Any], Cost]
    streaming: bool
    calibrated: str

    def merge(self) -> MergeFunction:
        """The method's function for a tensor by itself, as if it were the whole model."""

        @functools.wraps(self.find)
        def merge(
            base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
        ) -> torch.Tensor:
            from merging.ops.calibration import scale_for

            assert base is not None
            update, calibration = self.find(base, experts, task)
            scale = task.parameters.scale
            if scale == self.calibrated:
                scale = scale_for([calibration.kept])
            return _add(base, update, scale, calibration, task)

        return merge

    def staged(self) -> Staged:
        """The passes over a model."""
        find = Step(
            merge=self._find_update,
            cost=self.cost,
            separable="whole",
            streaming=self.streaming,
            takes_adapters=True,
        )
        combine = Step(
            merge=_find_scale, cost=_small_cost, separable="whole", streaming=True, flat=True
        )
        return Staged(
            reductions=(
                Reduction(
                    name="updates",
                    map=find,
                    entries=lambda g, _: g.num_entries + _NUM_FIGURES,
                    part=lambda g: slice(g.num_entries, g.num_entries + 1),
                    combine=combine,
                    combined_entries=lambda _: 1,
                    combined_dtype="F64",
                    ignores=frozenset({"scale"}),
                ),
            ),
            finish=Step(merge=_finish, cost=_adding_cost),
            group=self._group,
            keeps_map=True,
        )

    def _find_update(
        self, base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
    ) -> torch.Tensor:
        """A layer's update and its calibration, one after the other."""
        import torch

        assert base is not None
        update, calibration = self.find(base, experts, task)
        return torch.cat([update.reshape(-1), update.new_tensor(calibration)])

    def _group(self, parameters: Any, _: Sequence[Any]) -> Any:
        """All tensors share the scale, unless it is given."""
        return "model" if parameters.scale == self.calibrated else None


def _find_scale(_: torch.Tensor | None, kept: Iterator[torch.Tensor], task: Task) -> torch.Tensor:  # noqa: ARG001 - declared
    import torch

    from merging.ops.calibration import scale_for

    return torch.tensor([scale_for([float(one) for one in kept])], dtype=torch.float64)


def _finish(base: torch.Tensor | None, update: Iterator[torch.Tensor], task: Task) -> torch.Tensor:
    """Add a layer's update, or a tile of it, at the model's scale."""
    from merging.ops.calibration import Calibration

    assert base is not None
    found, numbers = task.given
    scale = task.parameters.scale
    if isinstance(scale, str):
        scale = float(found)
    return _add(base, next(update), scale, Calibration(*numbers.tolist()), task)


def _add(
    base: torch.Tensor, update: torch.Tensor, scale: float, calibration: Calibration, task: Task
) -> torch.Tensor:
    if not calibration.is_merged:
        scale = 1.0
    task.figures.update(calibration.describe(scale))
    return (update * scale).add_(base.to(update.dtype))


def _adding_cost(geometry: Geometry, parameters: Any) -> Cost:  # noqa: ARG001 - declared
    return Cost(flops=2.0 * geometry.num_entries, workspace_bytes=8 * geometry.num_entries)


def _small_cost(geometry: Geometry, parameters: Any) -> Cost:  # noqa: ARG001 - declared
    return Cost(flops=2.0 * geometry.num_experts, workspace_bytes=64 * geometry.num_experts)
