"""Merging by angles: combinations of a tensor's inputs by their inner products with one another.

Where a tensor and its inputs fit into memory they are read once. Else a pass over its tiles sums up
the inner products, which are all that is kept of it, and another one combines what it reads again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from merging.method import Cost, Geometry, MergeFunction, Reduction, Staged, Step, Task
from merging.ops.vectors import Kind, Vectors

if TYPE_CHECKING:
    import torch

_ITEM = 8

_WEIGHING = 4
"""As much as the products take is used so many times, with them, on the way to weights."""


@dataclass(frozen=True, kw_only=True)
class ByAngles:
    """How a method merges by angles.

    Shapes: n inputs, R vectors in each.

    Attributes:
        weights: From the inner products (R×n×n, float64): R×n weights of the inputs.
        kind: From the method's parameters, what counts as a vector.
        ignores: Parameters of the method that only the weights depend on.
        base: What it is: the first of the inputs, where they begin, or nothing.
    """

    weights: Callable[[torch.Tensor, Task], torch.Tensor]
    kind: Callable[[Any], Kind] = lambda _: "tensor"
    ignores: frozenset[str] = frozenset()
    base: Literal["input", "origin", "unused"] = "origin"

    def merge(self) -> MergeFunction:
        """The method's function: one tensor in one go. It counts as a function of its module."""

        @functools.wraps(self.weights)
        def merge(
            base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
        ) -> torch.Tensor:
            from merging.ops.combinations import add_inner_products, combine

            inputs, origin = self._inputs(base, experts)
            vectors = Vectors.of(inputs[0].shape, self.kind(task.parameters))
            products = _zeros(inputs, vectors)
            add_inner_products(products, inputs, origin, vectors)
            return combine(inputs, self.weights(products, task), origin, vectors, out=task.out)

        return merge

    def cost(self, geometry: Geometry, parameters: Any) -> Cost:
        """Inner products, and a weighted sum."""
        num_inputs = self._num_inputs(geometry.num_experts)
        return Cost(
            flops=(num_inputs**2 + 5.0 * num_inputs) * geometry.num_entries,
            workspace_bytes=geometry.block_bytes(num_buffers=4 * num_inputs + 4)
            + _WEIGHING * _ITEM * self._num_products(geometry, parameters),
        )

    def staged(self) -> Staged:
        """The passes over a tensor that is too large."""
        return Staged(
            reductions=(
                Reduction(
                    name="inner-products",
                    map=Step(merge=self._sum_up, cost=self._map_cost, separable="fold"),
                    entries=self._num_products,
                    dtype="F64",
                    ignores=self.ignores,
                ),
            ),
            finish=Step(merge=self._finish, cost=self.cost, rounds=True),
            group=lambda _parameters, _experts: None,
            takes_double=True,
        )

    def _inputs(
        self, base: torch.Tensor | None, experts: Iterator[torch.Tensor]
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """What is combined, and where it begins."""
        if self.base == "input":
            assert base is not None
            return [base, *experts], None
        return list(experts), base if self.base == "origin" else None

    def _num_inputs(self, num_experts: int) -> int:
        return num_experts + (self.base == "input")

    def _num_products(self, geometry: Geometry, parameters: Any) -> int:
        shape = geometry.tiled_shape or geometry.shape
        vectors = Vectors.of(shape, self.kind(parameters))
        return vectors.count * self._num_inputs(geometry.num_experts) ** 2

    def _sum_up(
        self, base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
    ) -> torch.Tensor:
        """The inner products up to the end of a tile."""
        from merging.ops.combinations import add_inner_products

        inputs, origin = self._inputs(base, experts)
        vectors = Vectors.of(task.shape, self.kind(task.parameters))
        if "products" not in task.memory:
            task.memory["products"] = _zeros(inputs, vectors)
        products: torch.Tensor = task.memory["products"]
        add_inner_products(products, inputs, origin, vectors, task.offset)
        return products

    def _finish(
        self, base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
    ) -> torch.Tensor:
        """Merge one tensor, or the next tile of one, by inner products that are known."""
        from merging.ops.combinations import combine

        inputs, origin = self._inputs(base, experts)
        vectors = Vectors.of(task.shape, self.kind(task.parameters))
        if "weights" not in task.memory:
            products = task.given[-1].view(-1, len(inputs), len(inputs))
            task.memory["weights"] = self.weights(products, task)
        weights: torch.Tensor = task.memory["weights"]
        return combine(inputs, weights, origin, vectors, task.offset, task.out)

    def _map_cost(self, geometry: Geometry, _: Any) -> Cost:
        """The inner products, which are the result."""
        num_inputs = self._num_inputs(geometry.num_experts)
        return Cost(
            flops=(num_inputs**2 + 2.0 * num_inputs) * geometry.num_entries,
            workspace_bytes=geometry.block_bytes(num_buffers=4 * num_inputs + 4),
        )


def _zeros(inputs: Sequence[torch.Tensor], vectors: Vectors) -> torch.Tensor:
    import torch

    shape = (vectors.count, len(inputs), len(inputs))
    return torch.zeros(shape, dtype=torch.float64, device=inputs[0].device)
