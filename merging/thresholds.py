"""Thresholds over a whole model: numbers of a given rank among those of all tensors.

A method that trims task vectors of whole models needs, say, the k-th largest magnitude of each. Two
passes over the models find it exactly, each with a histogram of every tensor
(:mod:`merging.ops.quantiles`), whatever the models' size; what is left is the method's last pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merging.method import Cost, Geometry, Reduction, Separability, Step, Task
from merging.ops.bins import COARSE_BINS, FINE_BINS, numbers_of

if TYPE_CHECKING:
    import torch

    from merging.ops.quantiles import Row
    from merging.ops.selection import Rank
    from merging.ops.sparsify import KeepFromThresholds

CostFunction = Callable[[Geometry, Any], Cost]


def _nothing(_: Geometry, __: Any) -> Cost:
    return Cost(0.0, 0)


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What numbers a method ranks, and which of them it seeks.

    Attributes:
        name: Of the passes.
        rows: From what the method gets: ``num_rows`` rows of non-negative numbers; None for one in
            which nothing is sought. Those of a tile may be asked for.
        ranks: Which number of each row is sought over all tensors, if any.
        keeps_ties: Whether all numbers equal to one that is sought are kept; else just so many
            that it is the last.
        num_rows: See above; given the number of experts, by default one for each.
        cost: Of making the rows, beside counting them.
        separable: Whether rows of tiles are those of the tensor; ``whole`` if not.
        takes_adapters: Whether ``rows`` does.
        needed: Whether anything is sought, with these parameters.
    """

    name: str
    rows: Callable[[torch.Tensor, Iterator[torch.Tensor], Task], Iterable[Row | None]]
    ranks: Callable[[Task], Sequence[Rank | None]]
    keeps_ties: Callable[[Task], bool] = lambda _: True
    num_rows: Callable[[int], int] = lambda num_experts: num_experts
    cost: CostFunction = _nothing
    separable: Separability = "sum"
    takes_adapters: bool = False
    needed: Callable[[Any], bool] = lambda _: True

    def reductions(self) -> tuple[Reduction, Reduction]:
        """The two passes; the second one's result is what ``read_thresholds`` reads."""
        return (
            self._reduction(f"{self.name}coarse-counts", COARSE_BINS, self._coarse, self._upper),
            self._reduction(f"{self.name}fine-counts", FINE_BINS, self._fine, self._exact),
        )

    def of_tensor(
        self, base: torch.Tensor, experts: Sequence[torch.Tensor], task: Task
    ) -> torch.Tensor:
        """The second pass's result as if one tensor were the whole model."""
        from merging.ops.quantiles import choose_coarse, choose_fine, count_coarse, count_fine

        size, device = base.numel(), base.device
        counts = count_coarse(self.rows(base, iter(experts), task), size, device, is_tile=False)
        chosen = choose_coarse([counts], self.ranks(task))
        rows = self.rows(base, iter(experts), task)
        counts = count_fine(rows, chosen, size, device, is_tile=False)
        return choose_fine([counts], chosen, keeps_ties=self.keeps_ties(task))

    def _coarse(
        self, base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
    ) -> torch.Tensor:
        from merging.ops.quantiles import count_coarse

        assert base is not None
        rows = self.rows(base, experts, task)
        return count_coarse(rows, base.numel(), base.device, is_tile=task.offset > 0)

    def _fine(
        self, base: torch.Tensor | None, experts: Iterator[torch.Tensor], task: Task
    ) -> torch.Tensor:
        from merging.ops.quantiles import count_fine

        assert base is not None
        *_, chosen = task.given
        rows = self.rows(base, experts, task)
        return count_fine(rows, chosen, base.numel(), base.device, is_tile=task.offset > 0)

    def _upper(
        self, _: torch.Tensor | None, counts: Iterator[torch.Tensor], task: Task
    ) -> torch.Tensor:
        from merging.ops.quantiles import choose_coarse

        return choose_coarse(counts, self.ranks(task))

    def _exact(
        self, _: torch.Tensor | None, counts: Iterator[torch.Tensor], task: Task
    ) -> torch.Tensor:
        from merging.ops.quantiles import choose_fine

        return choose_fine(counts, task.given[-1], keeps_ties=self.keeps_ties(task))

    def _reduction(
        self,
        name: str,
        bins: int,
        count: Callable[..., torch.Tensor],
        choose: Callable[..., torch.Tensor],
    ) -> Reduction:
        return Reduction(
            name=name,
            map=Step(
                merge=count,
                cost=self._count_cost,
                separable=self.separable,
                takes_adapters=self.takes_adapters,
            ),
            entries=lambda g, _: self.num_rows(g.num_experts) * numbers_of(g.num_entries, bins),
            dtype="I64",
            combine=Step(
                merge=choose, cost=_choose_cost, separable="whole", streaming=True, flat=True
            ),
            combined_entries=lambda num_experts: 2 * self.num_rows(num_experts),
            combined_dtype="I64",
            needed=self.needed,
        )

    def _count_cost(self, geometry: Geometry, parameters: Any) -> Cost:
        """A histogram takes a few operators per entry; those of all rows are held twice."""
        rows = self.num_rows(geometry.num_experts)
        making = self.cost(geometry, parameters)
        return Cost(
            flops=6.0 * rows * geometry.num_entries + making.flops,
            workspace_bytes=2 * 8 * rows * numbers_of(geometry.num_entries, FINE_BINS)
            + geometry.block_bytes(num_buffers=6)
            + making.workspace_bytes,
        )


def of_task_vectors(
    densities: Callable[[Task], Sequence[float]], is_global: Callable[[Task], bool]
) -> Thresholds:
    """The magnitudes beyond which a share of each task vector's entries lies; none of share 1.

    Of a whole model the (D - ⌊share D⌋)-th smallest of D magnitudes, with all that are equal to it,
    as in TIES' algorithm and its authors' code; of a tensor the last of the share.
    """

    def rows(
        base: torch.Tensor, experts: Iterator[torch.Tensor], task: Task
    ) -> Iterator[Row | None]:
        from merging.ops.quantiles import magnitudes

        for expert, density in zip(experts, densities(task), strict=True):
            yield magnitudes(base, expert) if density < 1 else None

    def ranks(task: Task) -> list[Rank | None]:
        from merging.ops.selection import first_beyond_largest, last_of_largest

        rank = first_beyond_largest if is_global(task) else last_of_largest
        return [rank(density) if density < 1 else None for density in densities(task)]

    return Thresholds(name="", rows=rows, ranks=ranks, keeps_ties=is_global)


def own_densities(task: Task) -> list[float]:
    """The experts' own."""
    return [parameters.density for parameters in task.expert_parameters]


def has_global_scope(task: Task) -> bool:
    """Whether thresholds are those of the whole model."""
    return bool(task.parameters.scope == "global")


def group_by_density(parameters: Any, experts: Sequence[Any]) -> Any:
    """Tensors of the whole model share thresholds where their densities are the same."""
    densities = [expert.density for expert in experts]
    return densities if parameters.scope == "global" and min(densities) < 1 else None


def keep_beyond(task: Task, like: torch.Tensor) -> KeepFromThresholds:
    """Keeps what lies beyond known thresholds; the same for all tiles of a tensor.

    Args:
        task: Its second given values are those of the second pass.
        like: Flat tensor of the work dtype, as long as the first tile or a block.
    """
    from merging.ops.quantiles import read_thresholds
    from merging.ops.sparsify import KeepFromThresholds

    if "keep" not in task.memory:
        task.memory["keep"] = KeepFromThresholds(read_thresholds(task.given[1]), like)
    keep: KeepFromThresholds = task.memory["keep"]
    return keep


def _choose_cost(geometry: Geometry, _: Any) -> Cost:
    return Cost(
        flops=float(geometry.num_experts * geometry.num_entries),
        workspace_bytes=4 * 8 * geometry.num_entries,
    )
