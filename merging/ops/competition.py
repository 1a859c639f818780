"""PCB: entries of task vectors that compete for their place in the merged model.

Shapes: E experts, N entries of a flat tensor or tile, B of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from merging.ops.blocks import blocks_of, work_dtype

_SMALLEST_SUM = 1e-12
"""Divides where no expert has a score."""


class Competition:
    """Clamped task vectors, and scores of their entries, block by block.

    Source: Du et al., "Parameter Competition Balancing for Model Merging", NeurIPS 2024,
    arXiv:2410.02396, section 3.

    Args:
        base: Base tensor, or a tile of it.
        experts: Expert tensors likewise.
        limits: Of each expert's magnitudes, the smallest and the largest after clamping.
    """

    def __init__(
        self,
        base: torch.Tensor,
        experts: Sequence[torch.Tensor],
        limits: Sequence[tuple[float, float]],
    ) -> None:
        self._base_N = base.reshape(-1)
        self._experts_N = [expert.reshape(-1) for expert in experts]
        self._limits = limits
        self.dtype = work_dtype((base, *experts))

    def task_vectors(self, block: slice) -> torch.Tensor:
        """Those of all experts (E×B)."""
        origin = self._base_N[block].to(self.dtype)
        return torch.stack([expert[block].to(self.dtype).sub(origin) for expert in self._experts_N])

    def clamped(self, task_vectors_EB: torch.Tensor) -> torch.Tensor:
        """Task vectors with magnitudes between the limits."""
        low, high = task_vectors_EB.new_tensor(self._limits).t()[:, :, None]
        return task_vectors_EB.abs().clamp(low, high).mul_(task_vectors_EB.sign())

    def scores(self, task_vectors_EB: torch.Tensor) -> torch.Tensor:
        """exp(E (m² - 1)) tanh(t Σ t), m the clamped magnitudes from 0 to 1; not below 0.

        The paper's score times a factor, which keeps it in range however many experts there are; in
        float32, as it is ranked.
        """
        low, high = task_vectors_EB.new_tensor(self._limits).double().t()[:, :, None]
        magnitudes = task_vectors_EB.double().abs().clamp(low, high)
        width = (high - low).where(high > low, 1)
        inner = ((magnitudes - low) / width).square_().sub_(1).mul_(len(task_vectors_EB)).exp_()
        both = (task_vectors_EB * task_vectors_EB.sum(dim=0)).tanh_()
        found: torch.Tensor = inner.mul_(both).clamp_(min=0).to(torch.float32)
        return found

    def all_scores(self) -> torch.Tensor:
        """Scores of all entries (E×N)."""
        shape = (len(self._experts_N), self._base_N.numel())
        found = torch.empty(shape, dtype=torch.float32, device=self._base_N.device)
        for block in self._blocks():
            found[:, block] = self.scores(self.task_vectors(block))
        return found

    def merge(
        self,
        ranges: Sequence[tuple[float, float]],
        weights: Sequence[float],
        scale: float,
        shape: Sequence[int],
    ) -> torch.Tensor:
        """The base plus the clamped task vectors' mean, weighted by scores.

        Args:
            ranges: Of each expert's scores, the one that counts as 0 and the one that counts as 1.
            weights: Factors on the task vectors.
            scale: Factor on the mean.
            shape: Of the result.
        """
        device = self._base_N.device
        merged_N = torch.empty(self._base_N.numel(), dtype=self.dtype, device=device)
        low, high = torch.tensor(ranges, dtype=torch.float64, device=device).t()[:, :, None]
        width = (high - low).where(high > low, torch.inf)
        factors = torch.tensor(weights, dtype=self.dtype, device=device)[:, None]
        for block in self._blocks():
            vectors = self.task_vectors(block)
            shares = ((self.scores(vectors).double() - low) / width).clamp_(0, 1).to(self.dtype)
            total = shares.sum(dim=0).clamp_(min=_SMALLEST_SUM)
            mean = self.clamped(vectors).mul_(factors).mul_(shares).sum(dim=0).div_(total)
            merged_N[block] = mean.mul_(scale).add_(self._base_N[block].to(self.dtype))
        return merged_N.view(list(shape))

    def _blocks(self) -> Iterator[slice]:
        """Blocks that have as many entries as others for all experts together, and less."""
        rows = 2 * len(self._experts_N)
        return blocks_of(self._base_N.numel(), self._base_N.device, rows)
