"""Merge methods as their papers state them, in float64 and without a thought for speed.

Written from the formulas, not from the code under test. Everything takes and gives whole tensors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch

MASK64 = 2**64 - 1


def _double(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.float64).numpy()


def linear(
    experts: Sequence[torch.Tensor], weights: Sequence[float], *, normalize: bool = True
) -> np.ndarray:
    """Σ a_i W_i, divided by Σ a_i."""
    total = sum(a * _double(W) for a, W in zip(weights, experts, strict=True))
    return total / sum(weights) if normalize else total


def _mix(
    base: torch.Tensor,
    vectors: Sequence[np.ndarray],
    weights: Sequence[float],
    *,
    scale: float,
    normalize: bool,
    elect: bool,
) -> np.ndarray:
    """mergekit's mixing of (sparsified) task vectors: weigh, elect, sum, normalise, scale, add."""
    weighted = [a * T for a, T in zip(weights, vectors, strict=True)]
    counts = [np.ones_like(T) for T in vectors]
    if elect:
        elected = np.where(sum(weighted) >= 0, 1.0, -1.0)
        counts = [(np.sign(T) == elected).astype(float) for T in weighted]
    total = sum(T * agrees for T, agrees in zip(weighted, counts, strict=True))
    if normalize:
        divisor = sum(a * agrees for a, agrees in zip(weights, counts, strict=True))
        total = total / np.where(divisor == 0, 1.0, divisor)
    return _double(base) + scale * total


def task_vectors(base: torch.Tensor, experts: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """T_i = W_i − W0."""
    return [_double(W) - _double(base) for W in experts]


def task_arithmetic(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    scale: float = 1.0,
    normalize: bool = False,
) -> np.ndarray:
    """W0 + λ Σ a_i T_i."""
    vectors = task_vectors(base, experts)
    return _mix(base, vectors, weights, scale=scale, normalize=normalize, elect=False)


def trim(vector: np.ndarray, density: float) -> np.ndarray:
    """The max(1, ⌊density n⌋) entries of largest magnitude, earlier ones first; zero elsewhere."""
    if density >= 1 or vector.size == 0:
        return vector
    flat = vector.reshape(-1)
    order = np.argsort(-np.abs(flat), kind="stable")
    kept = order[: max(1, int(density * flat.size))]
    trimmed = np.zeros_like(flat)
    trimmed[kept] = flat[kept]
    return trimmed.reshape(vector.shape)


def ties(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    scale: float = 1.0,
    normalize: bool = True,
) -> np.ndarray:
    """Trim each tensor's task vectors, elect signs, take the disjoint mean."""
    vectors = task_vectors(base, experts)
    trimmed = [trim(T, density) for T, density in zip(vectors, densities, strict=True)]
    return _mix(base, trimmed, weights, scale=scale, normalize=normalize, elect=True)


def splitmix64(state: int) -> int:
    """Output of SplitMix64 in that state (Steele, Lea and Flood 2014, figure 16)."""
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def dare_mask(seed: int, expert: int, tensor_name: str, count: int, density: float) -> np.ndarray:
    """Which entries are kept: a 32-bit uniform number per entry, two from each state."""
    digest = hashlib.sha256(f"{seed}/{expert}/{tensor_name}".encode()).digest()
    key = int.from_bytes(digest[:8], "little")
    mask = np.ones(count)
    if density == 1:
        return mask
    for i in range(count):
        bits = splitmix64((key + (i // 2 + 1) * 0x9E3779B97F4A7C15) & MASK64)
        half = bits & 0xFFFFFFFF if i % 2 == 0 else bits >> 32
        # The lanes are compared as signed numbers: the sign bit is the largest digit, flipped.
        mask[i] = (half ^ 0x80000000) < round(density * 2**32)
    return mask


def dare(
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    masks: Sequence[np.ndarray],
    *,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    elect: bool = False,
) -> np.ndarray:
    """m ∘ T / (1 − p), then a sum or an election."""
    dropped = [
        mask.reshape(T.shape) * T / (density if rescale else 1.0)
        for T, mask, density in zip(task_vectors(base, experts), masks, densities, strict=True)
    ]
    return _mix(base, dropped, weights, scale=scale, normalize=normalize, elect=elect)


def wudi_rates(vectors: Sequence[np.ndarray]) -> tuple[float, float]:
    """Learning rate and epsilon that follow the root mean square of the non-zero task vectors."""
    rms = math.sqrt(np.mean([np.mean(T**2) for T in vectors if np.any(T)]))
    return 0.037 * rms, 1e-8 * rms / 2.7e-4


def wudi_update(
    vectors: Sequence[np.ndarray], *, steps: int, learning_rate: float, epsilon: float
) -> np.ndarray:
    """Algorithm 1: Adam by automatic differentiation on Σ w_i ‖(M − T_i) T_iᵀ‖²_F."""
    Ts = torch.stack([torch.from_numpy(T) for T in vectors if np.any(T)])
    weights = 1 / Ts.square().sum(dim=(1, 2))
    M = torch.nn.Parameter(Ts.sum(dim=0))
    adam = torch.optim.Adam([M], lr=learning_rate, eps=epsilon)
    for _ in range(steps):
        adam.zero_grad()
        interference = (M - Ts) @ Ts.transpose(1, 2)
        loss = (weights * interference.square().sum(dim=(1, 2))).sum()
        loss.backward()
        adam.step()
    return M.detach().numpy()


def wudi_loss(vectors: Sequence[np.ndarray], M: np.ndarray) -> float:
    """Σ w_i ‖(M − T_i) T_iᵀ‖²_F."""
    return float(sum(np.sum(((M - T) @ T.T) ** 2) / np.sum(T**2) for T in vectors if np.any(T)))


def cfs_update(vectors: Sequence[np.ndarray], omegas: Sequence[float]) -> np.ndarray:
    """Eq. 20: [Σ w_i T_i (T_iᵀT_i + ω_i I)] [Σ w_i (T_iᵀT_i + ω_i I)]⁻¹."""
    identity = np.eye(vectors[0].shape[1])
    left, right = 0.0, 0.0
    for T, omega in zip(vectors, omegas, strict=True):
        if np.any(T):
            gram = (T.T @ T + omega * identity) / np.sum(T**2)
            left = left + T @ gram
            right = right + gram
    return left @ np.linalg.inv(right)
