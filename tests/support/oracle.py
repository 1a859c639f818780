"""Merge methods as their papers state them, in float64 and without a thought for speed.

Written from the formulas, not from the code under test. Everything takes and gives whole tensors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

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


def mix(
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
    return mix(base, vectors, weights, scale=scale, normalize=normalize, elect=False)


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
    return mix(base, trimmed, weights, scale=scale, normalize=normalize, elect=True)


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
    return mix(base, dropped, weights, scale=scale, normalize=normalize, elect=elect)


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


FLOOR = 1e-8
"""The authors of SWUDI raise eigenvalues to this."""


def _quadratic(vectors: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A = Σ w_i T_iᵀT_i, B = Σ w_i T_i T_iᵀT_i and M₀ = Σ T_i."""
    taking_part = [T for T in vectors if np.any(T)]
    A = sum(T.T @ T / np.sum(T**2) for T in taking_part)
    B = sum(T @ T.T @ T / np.sum(T**2) for T in taking_part)
    return A, B, sum(taking_part)


def spectrum(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Eigenvalues of A, the largest first, not below the floor."""
    return np.maximum(np.linalg.eigvalsh(_quadratic(vectors)[0])[::-1], FLOOR)


def effective_rank(vectors: Sequence[np.ndarray]) -> float:
    """(Σ √λ)² / Σ λ."""
    values = spectrum(vectors)
    return float(np.sum(np.sqrt(values)) ** 2 / np.sum(values))


def filtered_update(
    vectors: Sequence[np.ndarray], gains: np.ndarray, *, init: str = "sum"
) -> np.ndarray:
    """M₀ (I − V f Vᵀ) + B V (f/λ) Vᵀ, the gains f given for the largest eigenvalue first."""
    A, B, M0 = _quadratic(vectors)
    values, V = np.linalg.eigh(A)
    values, V = np.maximum(values[::-1], FLOOR), V[:, ::-1]
    kept = M0 @ (np.eye(len(A)) - V @ np.diag(gains) @ V.T) if init == "sum" else 0.0
    return kept + B @ V @ np.diag(gains / values) @ V.T


def swudi_update(
    vectors: Sequence[np.ndarray], *, t: float, r: float, init: str = "sum"
) -> np.ndarray:
    """The exponential filter in the ⌈r I⌉ strongest directions."""
    values = spectrum(vectors)
    kept = np.arange(len(values)) < math.ceil(r * len(values))
    return filtered_update(vectors, kept * (1 - np.exp(-values * t)), init=init)


def swudi_a_update(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """The exact solution in as many directions as the effective rank, rounded up."""
    num_columns = vectors[0].shape[1]
    kept = np.arange(num_columns) < math.ceil(effective_rank(vectors))
    return filtered_update(vectors, kept.astype(float))


def iso_wudi(vectors: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """The isotropic update I of SWUDI-A's, and the mean share p of the task vectors in it."""
    U, S, Vt = np.linalg.svd(swudi_a_update(vectors), full_matrices=False)
    isotropic = np.mean(S) * U @ Vt
    return isotropic, float(np.mean([np.sum(isotropic * T) / np.sum(T**2) for T in vectors]))


def flow_update(vectors: Sequence[np.ndarray], *, t: float) -> np.ndarray:
    """Where the flow dM/dt = B − M A from M₀ is at time t, by one matrix exponential."""
    A, B, M0 = _quadratic(vectors)
    rows, columns = M0.shape
    generator = np.zeros((columns + rows, columns + rows))
    generator[:columns, :columns], generator[columns:, :columns] = -A, B
    flow = torch.linalg.matrix_exp(t * torch.from_numpy(generator)).numpy()
    return (np.hstack([M0, np.eye(rows)]) @ flow)[:, :columns]


def _truncated(T: np.ndarray, rank: int) -> np.ndarray:
    """The part of T with its largest singular values."""
    U, S, Vt = np.linalg.svd(T, full_matrices=False)
    return U[:, :rank] @ np.diag(S[:rank]) @ Vt[:rank]


def optmerge_terms(
    vectors: Sequence[np.ndarray], *, variant: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Targets T̂_i and directions P_i = S_K V_Kᵀ."""
    taking_part = [T for T in vectors if np.any(T)]
    rank = max(1, min(taking_part[0].shape) // len(taking_part))
    mean = sum(taking_part) / len(taking_part)
    targets, directions = [], []
    for T in taking_part:
        _, S, Vt = np.linalg.svd(T, full_matrices=False)
        directions.append(np.diag(S[:rank]) @ Vt[:rank])
        if variant == "full":
            targets.append(mean + _truncated(T - mean, rank))
        else:
            targets.append(_truncated(T, rank))
    return targets, directions


def optmerge_update(
    vectors: Sequence[np.ndarray],
    *,
    variant: str,
    steps: int,
    learning_rate: float,
    epsilon: float = 1e-8,
) -> np.ndarray:
    """Σ w_i ‖(M − T̂_i) P_iᵀ‖²_F by automatic differentiation: Adam, or descent with momentum."""
    taking_part = [T for T in vectors if np.any(T)]
    targets, directions = optmerge_terms(vectors, variant=variant)
    total = torch.from_numpy(sum(taking_part))
    if variant == "full":
        M = torch.nn.Parameter(total)
        optimizer = torch.optim.Adam([M], lr=learning_rate, eps=epsilon)
    else:
        M = torch.nn.Parameter(total / len(taking_part))
        optimizer = torch.optim.SGD([M], lr=learning_rate, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = 0.0
        for T, target, P in zip(taking_part, targets, directions, strict=True):
            interference = (M - torch.from_numpy(target)) @ torch.from_numpy(P).T
            loss = loss + interference.square().sum() / np.sum(T**2)
        loss.backward()
        optimizer.step()
    return M.detach().numpy()


def iso_c(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """mean(S) U Vᵀ of Σ T_i."""
    U, S, Vt = np.linalg.svd(sum(vectors), full_matrices=False)
    return S.mean() * U @ Vt


def _polar(M: np.ndarray) -> np.ndarray:
    U, _, Vt = np.linalg.svd(M, full_matrices=False)
    return U @ Vt


def tsv_m(vectors: Sequence[np.ndarray], num_tasks: int = 0) -> np.ndarray:
    """Leading triplets of every task, sides made orthonormal."""
    count = min(vectors[0].shape) // (num_tasks or len(vectors))
    found = [np.linalg.svd(T, full_matrices=False) for T in vectors]
    left = _polar(np.concatenate([U[:, :count] for U, _, _ in found], axis=1))
    right = _polar(np.concatenate([Vt[:count] for _, _, Vt in found], axis=0))
    return left @ np.diag(np.concatenate([S[:count] for _, S, _ in found])) @ right


def iso_cts(vectors: Sequence[np.ndarray], share: float) -> np.ndarray:
    """Common directions of the sum and each task's own, all with the mean singular value."""
    size, count = min(vectors[0].shape), len(vectors)
    common = size - count * round((size - int(share * size)) / count)
    each = (size - common) // count
    U, S, Vt = np.linalg.svd(sum(vectors), full_matrices=False)
    U, S, Vt = U[:, :common], S[:common], Vt[:common]
    own = [np.linalg.svd(T - U @ U.T @ T, full_matrices=False) for T in vectors]
    left = np.concatenate([*(u[:, :each] for u, _, _ in own), U], axis=1)
    right = np.concatenate([*(vt[:each] for _, _, vt in own), Vt], axis=0)
    mean = np.concatenate([*(s[:each] for _, s, _ in own), S]).mean()
    return mean * _polar(left) @ _polar(right)


def dc_merge(
    vectors: Sequence[np.ndarray],
    density: float,
    smooth: Callable[[np.ndarray], np.ndarray] = lambda values: values,
) -> np.ndarray:
    """Truncated task vectors in a common basis, largest entries, agreeing mean, own blocks."""
    count = min(vectors[0].shape) // len(vectors)
    found = [np.linalg.svd(T, full_matrices=False) for T in vectors]
    left = _polar(np.concatenate([U[:, :count] for U, _, _ in found], axis=1))
    right = _polar(np.concatenate([Vt[:count] for _, _, Vt in found], axis=0))
    kept = []
    for U, S, Vt in found:
        C = left.T @ (U[:, :count] @ np.diag(smooth(S[:count])) @ Vt[:count]) @ right.T
        smallest = np.sort(np.abs(C), axis=None)[-max(1, int(density * C.size))]
        kept.append(np.where(np.abs(C) >= smallest, C, 0))
    elected = np.sign(sum(kept))
    agrees = [(np.sign(C) == elected) & (elected != 0) for C in kept]
    merged = sum(C * a for C, a in zip(kept, agrees, strict=True)) / np.maximum(1, sum(agrees))
    own = np.kron(np.eye(len(vectors)), np.ones((count, count)))
    return left @ (merged * own) @ right


def knots_parts(vectors: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """U, and the S V_iᵀ, of the task vectors side by side."""
    U, S, Vt = np.linalg.svd(np.concatenate(vectors, axis=1), full_matrices=False)
    is_kept = 1e-6 * S[0] < S
    parts = np.split(np.diag(S[is_kept]) @ Vt[is_kept], len(vectors), axis=1)
    return U[:, is_kept], parts


def knots_ties(
    vectors: Sequence[np.ndarray],
    weights: Sequence[float],
    trimmed: Callable[[int, np.ndarray], np.ndarray],
    *,
    normalize: bool = True,
) -> np.ndarray:
    """U times TIES of the parts, each trimmed first by number."""
    U, parts = knots_parts(vectors)
    kept = [trimmed(number, part) for number, part in enumerate(parts)]
    zero = torch.zeros(kept[0].shape, dtype=torch.float64)
    return U @ mix(zero, kept, weights, scale=1.0, normalize=normalize, elect=True)


def pcb(vectors: Sequence[np.ndarray], ratio: float, weights: Sequence[float]) -> np.ndarray:
    """Scores within and between tasks, and the mean by scores, of task vectors of whole models."""
    shape, size = vectors[0].shape, vectors[0].size
    T = np.stack([vector.ravel() for vector in vectors])
    ordered = np.sort(np.abs(T), axis=1)
    low = ordered[:, [int(size * 1e-4)]]
    high = ordered[:, [int(size * (1 - 1e-4) - 1)]]
    clamped = np.clip(np.abs(T), low, high)
    inner = np.exp(len(T) * ((clamped - low) / (high - low)) ** 2)
    score = inner * np.tanh(T * T.sum(axis=0))
    smallest = np.sort(score, axis=1)[:, [int(size * (1 - ratio))]]
    score = np.maximum(score, smallest) - smallest
    share = score / score.max(axis=1, keepdims=True)
    weighted = np.array(weights)[:, None] * np.sign(T) * clamped * share
    return (weighted.sum(axis=0) / np.maximum(share.sum(axis=0), 1e-12)).reshape(shape)


def consensus(
    merged: np.ndarray, vectors: Sequence[np.ndarray], lambdas: Sequence[float], min_tasks: int
) -> np.ndarray:
    """What enough tasks need of a merged task vector, by their TALL masks."""
    masks = [np.abs(T) > a * np.abs(merged - T) for T, a in zip(vectors, lambdas, strict=True)]
    return np.where(sum(mask.astype(int) for mask in masks) >= min_tasks, merged, 0)


def opcm_sum(vectors: Sequence[np.ndarray], alpha: float | None) -> np.ndarray:
    """Task vectors added up, each without the protected block and the diagonal in full bases."""
    total = vectors[0]
    for T in vectors[1:]:
        if alpha is not None:
            U, S, Vt = np.linalg.svd(total)
            rank = int(np.argmax(np.cumsum(S) / S.sum() > alpha))
            inner = U.T @ T @ Vt.T
            np.fill_diagonal(inner, 0)
            inner[:rank, :rank] = 0
            T = U @ inner @ Vt
        total = total + T
    return total


def doge(
    vectors: Sequence[np.ndarray],
    thresholds: Sequence[float],
    *,
    eta: float,
    subspace: int,
    steps: int,
    learning_rate: float,
) -> np.ndarray:
    """The authors' loss by automatic differentiation, gradients projected, largest entries kept."""
    smaller, each = min(vectors[0].shape), min(vectors[0].shape) // len(vectors)
    leading = [np.linalg.svd(T, full_matrices=False)[0][:, :each] for T in vectors]
    shared = np.linalg.svd(np.concatenate(leading, axis=1), full_matrices=False)[0]
    U = torch.from_numpy(shared[:, : smaller // subspace])
    Ts = torch.stack([torch.from_numpy(T) for T in vectors])
    factors = eta / Ts.square().sum(dim=(1, 2), keepdim=True).sqrt()
    delta = torch.nn.Parameter(torch.zeros_like(Ts[0]))
    adam = torch.optim.Adam([delta], lr=learning_rate)
    for _ in range(steps):
        adam.zero_grad()
        merged = (factors * (Ts + delta)).sum(dim=0)
        loss = sum((T * (T - merged)).sum(dim=1).square().sum() for T in Ts)
        loss.backward()
        delta.grad -= U @ U.T @ delta.grad
        adam.step()
    masks = torch.stack([T.abs() >= threshold for T, threshold in zip(Ts, thresholds, strict=True)])
    return (factors * masks * (Ts + delta)).sum(dim=0).detach().numpy()


def svc(update: np.ndarray, vectors: Sequence[np.ndarray], alpha: float) -> np.ndarray:
    """Each singular value over the mean share of the tasks' responses in its left direction."""
    U, S, Vt = np.linalg.svd(update, full_matrices=False)
    factors = np.ones_like(S)
    for r, u in enumerate(U.T):
        shares = []
        for T in vectors:
            square = np.sum((u @ T) ** 2)
            is_there = square > 1e-20 * np.sum(T**2)
            shares.append(max(alpha, (u @ update) @ (u @ T) / square) if is_there else alpha)
        factors[r] = len(vectors) / sum(shares)
    return U @ np.diag(S * factors) @ Vt


def robust_merge(
    factors: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    density: float,
    quantile: float,
    gain: float,
) -> np.ndarray:
    """B A of factors of one rank, trimmed and weighed by what the trim took."""

    def keep(M: np.ndarray) -> np.ndarray:
        smallest = np.sort(np.abs(M), axis=None)[max(1, int(M.size * (1 - density))) - 1]
        return np.where(np.abs(M) >= smallest, M, 0)

    worth = []
    for _, A in factors:
        own = np.abs(A).sum(axis=1) / np.abs(keep(A)).sum(axis=1)
        worth.append(np.maximum(own, np.sort(own)[int(len(own) * quantile)]))
    merged_A = gain * sum(keep(A) for _, A in factors)
    merged_B = (
        gain * sum(keep(B) * w for (B, _), w in zip(factors, worth, strict=True)) / sum(worth)
    )
    return merged_B @ merged_A
