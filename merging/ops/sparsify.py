"""Which entries of a task vector are kept: the largest ones, or a random share.

Both are used as the ``sparsify`` argument of :func:`merging.ops.task_vectors.combine_task_vectors`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch

from merging.ops.blocks import (
    as_array,
    block_size,
    blocks_of,
    count_true,
    keep_where,
    positions_of,
    work_dtype,
)
from merging.ops.selection import (
    ALL,
    Rank,
    Threshold,
    find_thresholds,
    last_of_largest,
    sample_of,
)


class KeepFromThresholds:
    """Keeps entries above a threshold, and so many of those equal to it, lowest flat index first.

    Args:
        thresholds: One for each expert.
        like: Flat tensor of the work dtype, as long as the longest tile to come (or a block).
    """

    def __init__(self, thresholds: Sequence[Threshold], like: torch.Tensor) -> None:
        self._all = thresholds
        self._thresholds = [threshold.value for threshold in thresholds]
        self._ties_left: list[float] = [threshold.ties for threshold in thresholds]
        size = min(block_size(like.device), like.numel())
        self._scratch = torch.empty(size, dtype=like.dtype, device=like.device)

    def afresh(self) -> Self:
        """The same for another pass over the tensors."""
        return type(self)(self._all, self._scratch)

    def __call__(self, expert: int, task_vector_N: torch.Tensor, start: int) -> None:  # noqa: ARG002 - Sparsify
        """Zero the entries of a block that are not kept; blocks must come in order."""
        if self._thresholds[expert] > 0:
            magnitudes = torch.abs(task_vector_N, out=self._scratch[: task_vector_N.numel()])
            keep_where(task_vector_N, self.mark(expert, magnitudes))

    def mark(self, expert: int, magnitudes: torch.Tensor) -> Any:
        """Which entries of the next block are kept: truth values for :func:`keep_where`."""
        threshold, ties_left = self._thresholds[expert], self._ties_left[expert]
        values = as_array(magnitudes)
        if threshold == 0:
            return ~(values < 0)
        if not ties_left:
            return values > threshold
        is_kept = values >= threshold
        is_tie = values == threshold
        num_ties = count_true(is_tie)
        self._ties_left[expert] = max(0, ties_left - num_ties)
        if num_ties > ties_left:
            is_kept[positions_of(is_tie)[int(ties_left) :]] = False
        return is_kept


def find_magnitudes(
    base: torch.Tensor, expert: torch.Tensor, ranks: Sequence[Rank | None]
) -> list[Threshold]:
    """The exact thresholds of ranks among a task vector's magnitudes; None means all of them.

    Args:
        base: Base tensor.
        expert: Of the same shape.
        ranks: Of the tensor's number of entries.
    """
    sought = [rank for rank in ranks if rank is not None]
    base_N, expert_N = base.reshape(-1), expert.reshape(-1)
    dtype = work_dtype((base, expert))

    def blocks() -> Iterator[torch.Tensor]:
        size = min(block_size(base.device), base.numel())
        scratch = torch.empty((2, size), dtype=dtype, device=base.device)
        for block in blocks_of(base.numel(), base.device):
            magnitudes, origin = scratch[:, : block.stop - block.start]
            origin.copy_(base_N[block])
            yield magnitudes.copy_(expert_N[block]).sub_(origin).abs_()

    found: Iterator[Threshold] = iter(())
    if sought:
        sample = (sample_of(expert_N).to(dtype) - sample_of(base_N).to(dtype)).abs_()
        is_whole = sample.numel() == base.numel()
        found = iter(find_thresholds(blocks, sample, sought, is_whole=is_whole))
    return [ALL if rank is None else next(found) for rank in ranks]


def keep_largest(
    base: torch.Tensor, experts: Sequence[torch.Tensor], densities: Sequence[float]
) -> KeepFromThresholds:
    """Keeps exactly ``max(1, ⌊density · N⌋)`` entries of largest magnitude of each task vector.

    Of equal magnitudes at the threshold those with the lowest flat index are kept: bfloat16 task
    vectors are full of equal magnitudes, and what is kept must not depend on how they were sorted.

    Args:
        base: Base tensor.
        experts: Tensors of the same shape.
        densities: Share to keep of each, in (0, 1].
    """
    thresholds = [
        find_magnitudes(base, expert, [last_of_largest(density) if density < 1 else None])[0]
        for expert, density in zip(experts, densities, strict=True)
    ]
    return KeepFromThresholds(thresholds, block_like(base, experts))


def block_like(base: torch.Tensor, experts: Sequence[torch.Tensor]) -> torch.Tensor:
    """An uninitialised block, or a tensor's length if that is less, of the work dtype."""
    size = min(base.numel(), block_size(base.device))
    return base.new_empty(size, dtype=work_dtype((base, *experts)))


class KeepRandom:
    """Keeps every entry with its expert's probability, independently, and may rescale the kept.

    Counter-based: whether entry i is kept is a function of (seed, expert, tensor name, i) alone, so
    masks do not depend on how the tensor is cut, on order, or on the device. The function is
    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) at position ⌊i/2⌋ of a sequence that starts at a
    hash of the rest; an even i takes the lower 32 bits of the output, an odd one the upper.

    Args:
        densities: Probability of keeping an entry of each expert, in (0, 1].
        rescale: Divide what is kept by the density, which keeps the mean.
        seed: The recipe's seed.
        tensor_name: Name of the tensor.
        offset: Flat index, in the whole tensor, of the first entry of the tile at hand.
        device: Where the task vectors are.
    """

    def __init__(
        self,
        densities: Sequence[float],
        *,
        rescale: bool,
        seed: int,
        tensor_name: str,
        offset: int,
        device: torch.device,
    ) -> None:
        self._densities = densities
        self._rescale = rescale
        self._offset = offset
        self._keys = [_stream_key(seed, expert, tensor_name) for expert, _ in enumerate(densities)]
        num_pairs = block_size(device) // 2 + 1
        self._steps = torch.arange(num_pairs, device=device).mul_(_signed(_GAMMA))
        self._state = torch.empty_like(self._steps)
        self._scratch = torch.empty_like(self._steps)

    def __call__(self, expert: int, task_vector_N: torch.Tensor, start: int) -> None:
        """Zero the entries of a block that are dropped, and rescale the others if asked."""
        density = self._densities[expert]
        if density == 1:
            return
        uniform = self.uniform_int32(expert, self._offset + start, task_vector_N.numel())
        is_kept = uniform < min(round(density * 2**32), 2**32 - 1) - 2**31
        keep_where(task_vector_N, is_kept)
        if self._rescale:
            task_vector_N.div_(density)

    def uniform_int32(self, expert: int, first: int, count: int) -> torch.Tensor:
        """Uniform 32-bit integers for the entries ``first … first + count - 1``.

        The next call may use their memory again.
        """
        size = 2 * (len(self._steps) - 1)
        if count <= size:
            return self._draw(expert, first, count)
        drawn = [
            self._draw(expert, first + start, min(size, count - start)).clone()
            for start in range(0, count, size)
        ]
        return torch.cat(drawn)

    def _draw(self, expert: int, first: int, count: int) -> torch.Tensor:
        """Those of entries of a block, in memory that the next call uses again."""
        pair, skip = divmod(first, 2)
        num_pairs = (skip + count + 1) // 2
        state, scratch = self._state[:num_pairs], self._scratch[:num_pairs]
        origin = self._keys[expert] + (pair + 1) * _GAMMA
        torch.add(self._steps[:num_pairs], _signed(origin), out=state)
        mix = _mix_on_host if state.device.type == "cpu" else _mix_on_device
        mix(state, scratch)
        return state.view(torch.int32)[skip : skip + count]


_MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""SplitMix64's shifts and the factors that follow on them."""

_GAMMA = 0x9E3779B97F4A7C15
"""SplitMix64's increment: 2⁶⁴ divided by the golden ratio, made odd."""


def _stream_key(seed: int, expert: int, tensor_name: str) -> int:
    """64 bits that say where an expert's stream starts for a tensor."""
    text = f"{seed}/{expert}/{tensor_name}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _signed(value: int) -> int:
    """The int64 with the same lowest 64 bits; torch has no full unsigned arithmetic."""
    return (value + 2**63) % 2**64 - 2**63


def _mix_on_host(state: torch.Tensor, scratch: torch.Tensor) -> None:
    """SplitMix64's output function, in place. NumPy's unsigned words take half of torch's time."""
    words, shifted = state.numpy().view(np.uint64), scratch.numpy().view(np.uint64)
    for shift, factor in _MIXING:
        np.bitwise_xor(words, np.right_shift(words, shift, out=shifted), out=words)
        if factor != 1:
            np.multiply(words, np.uint64(factor), out=words)


def _mix_on_device(state: torch.Tensor, scratch: torch.Tensor) -> None:
    """The same of signed integers, whose shifted words lose their copies of the sign."""
    for shift, factor in _MIXING:
        torch.bitwise_right_shift(state, shift, out=scratch)
        state.bitwise_xor_(scratch.bitwise_and_((1 << (64 - shift)) - 1)).mul_(_signed(factor))
