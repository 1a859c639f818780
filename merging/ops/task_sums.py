"""A layer's task vectors, read one at a time: their sums, and what a method makes of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from merging.ops.blocks import inner_product
from merging.ops.calibration import Calibration
from merging.ops.layer_method import LayerTask
from merging.ops.layers import naming, new_task_vector, write_task_vector
from merging.ops.low_rank import Expert
from merging.ops.precision import float32_products
from merging.ops.problem import norm_of


@dataclass(slots=True)
class TaskSums:
    """Sums over the task vectors T_i (O×I) of a layer.

    Attributes:
        total: Σ T_i.
        weighted: Σ T_i / ‖T_i‖²_F over those that are not zero.
        norms: ‖T_i‖_F of all.
    """

    total: torch.Tensor
    weighted: torch.Tensor
    norms: list[float] = field(default_factory=list)

    @property
    def num_nonzero(self) -> int:
        """How many task vectors are not zero."""
        return sum(norm > 0 for norm in self.norms)

    def calibrate(self, update: torch.Tensor) -> Calibration:
        """An update (O×I) beside the task vectors."""
        if self.num_nonzero < 2:
            norm = inner_product(self.total, self.total) ** 0.5
            return Calibration(0, 0, norm, norm)
        update = update.contiguous()
        return Calibration(
            kept=inner_product(update, self.weighted) / self.num_nonzero,
            is_merged=1,
            norm=inner_product(update, update) ** 0.5,
            sum_norm=inner_product(self.total, self.total) ** 0.5,
        )


def read_task_sums(
    base: torch.Tensor,
    experts: Iterator[Expert],
    *,
    transposed: bool,
    visit: Callable[[torch.Tensor], None] | None = None,
) -> TaskSums:
    """Read a layer's experts, one at a time.

    Args:
        base: Tensor of the base model.
        experts: Tensors of the experts, or adapters of the tensor.
        transposed: Tensors are stored in×out.
        visit: Called with each task vector that is not zero; its memory is used again.
    """
    sums: TaskSums | None = None
    T = torch.empty(0)
    for expert in experts:
        if sums is None:
            T = new_task_vector(base, expert, transposed=transposed)
            sums = TaskSums(torch.zeros_like(T), torch.zeros_like(T))
        write_task_vector(T, base, expert, transposed=transposed)
        del expert  # its memory may be used again from here on
        norm = norm_of(T)
        sums.norms.append(norm)
        if norm * norm > 0:
            sums.total.add_(T)
            sums.weighted.add_(T, alpha=1 / (norm * norm))
            if visit is not None:
                visit(T)
    assert sums is not None, "recipes without experts are refused"
    return sums


def update_by_sums(
    base: torch.Tensor,
    experts: Iterator[Expert],
    task: LayerTask,
    solve: Callable[[TaskSums], torch.Tensor],
    visit: Callable[[torch.Tensor], None] | None = None,
) -> tuple[torch.Tensor, Calibration]:
    """A layer's update in the shape of its tensor, and its calibration.

    Args:
        base: Tensor of the base model.
        experts: Tensors of the experts, or adapters of the tensor, read one at a time.
        task: Gets figures.
        solve: The update (O×I) of a layer that at least two experts changed.
        visit: As for :func:`read_task_sums`.

    Raises:
        NumericalError: ``did_not_converge``.
    """
    with float32_products(base.device), naming(task):
        sums = read_task_sums(base, experts, transposed=task.transposed, visit=visit)
        update = solve(sums) if sums.num_nonzero > 1 else sums.total
        calibration = sums.calibrate(update)
    task.figures["expert_norms"] = sums.norms
    task.figures["sum_norm"] = calibration.sum_norm
    if calibration.is_merged:
        task.figures["kept"] = calibration.kept
    return (update.t() if task.transposed else update).reshape(base.shape), calibration
