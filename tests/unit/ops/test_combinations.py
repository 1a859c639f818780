"""Inner products and combinations of tensors: the same bits however a tensor is cut."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from merging.ops.combinations import add_inner_products, combine
from merging.ops.vectors import Kind, Vectors
from tests.support.tensors import make_models

BLOCK = 16
"""Stands in for the blocks that tiles are multiples of."""

CUTS = [(0, 999), (0, 16, 999), (0, 48, 64, 160, 999), tuple(range(0, 999, BLOCK))]
KINDS: list[Kind] = ["tensor", "rows", "columns"]
SHAPES = [(33,), (7, 13), (3, 40), (40, 3), (2, 5, 9), (1, 64), (64, 1), ()]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merging.ops.combinations.TILE_MULTIPLE", BLOCK)


def as_vectors(tensor: torch.Tensor, kind: Kind) -> np.ndarray:
    """One vector in each row, in float64."""
    values = tensor.double().numpy()
    if kind == "tensor" or values.ndim < 2:
        return values.reshape(1, -1)
    return (
        values.reshape(-1, values.shape[-1])
        if kind == "rows"
        else values.reshape(len(values), -1).T
    )


def tiles(tensor: torch.Tensor, cuts: Sequence[int]) -> list[tuple[int, torch.Tensor]]:
    flat = tensor.reshape(-1)
    borders = [*(cut for cut in cuts if cut < len(flat)), len(flat)]
    return [(start, flat[start:end]) for start, end in pairwise(borders)]


def products(
    tensors: Sequence[torch.Tensor], origin: torch.Tensor | None, kind: Kind, cuts: Sequence[int]
) -> torch.Tensor:
    vectors = Vectors.of(tensors[0].shape, kind)
    sums = torch.zeros(vectors.count, len(tensors), len(tensors), dtype=torch.float64)
    origins = tiles(tensors[0] if origin is None else origin, cuts)
    for (start, first), *others in zip(origins, *(tiles(t, cuts) for t in tensors), strict=True):
        parts = [part for _, part in others]
        add_inner_products(sums, parts, None if origin is None else first, vectors, start)
    return sums


@pytest.mark.parametrize("has_origin", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_inner_products_are_those_of_the_vectors_whatever_the_tiles(
    shape: tuple[int, ...], kind: Kind, has_origin: bool
) -> None:
    base, experts = make_models(shape, 3, rms=0.02, dtype=torch.bfloat16)
    origin = base if has_origin else None
    found = [products(experts, origin, kind, cuts) for cuts in CUTS]
    for other in found[1:]:
        assert torch.equal(found[0], other)
    start = base.double() if has_origin else 0.0
    stacked = np.stack([as_vectors(expert.double() - start, kind) for expert in experts], axis=1)
    expected = stacked @ stacked.transpose(0, 2, 1)
    np.testing.assert_allclose(
        found[0].numpy(), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max()
    )


@pytest.mark.parametrize("has_origin", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_combinations_are_those_of_the_vectors_whatever_the_tiles(
    shape: tuple[int, ...], kind: Kind, has_origin: bool
) -> None:
    base, experts = make_models(shape, 3, rms=0.02, dtype=torch.bfloat16)
    vectors = Vectors.of(shape, kind)
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(vectors.count, 3, generator=generator, dtype=torch.float64)
    found = []
    for cuts in CUTS:
        parts = [
            combine(
                [part for _, part in others], weights, first if has_origin else None, vectors, start
            )
            for (start, first), *others in zip(
                tiles(base, cuts), *(tiles(expert, cuts) for expert in experts), strict=True
            )
        ]
        found.append(torch.cat(parts))
    for other in found[1:]:
        assert torch.equal(found[0], other)
    origin = as_vectors(base, kind) if has_origin else 0.0
    expected = origin + sum(
        weights[:, [number]].numpy() * (as_vectors(expert, kind) - origin)
        for number, expert in enumerate(experts)
    )
    merged = as_vectors(found[0].view(shape), kind)
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-8)


def test_nearly_parallel_tensors_keep_their_angle() -> None:
    """Of 3e-7, which the cosine in float32 knows nothing of."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(4096, generator=generator)
    other = first * (1 + 3e-7 * torch.randn(4096, generator=generator))
    found = products([first, other], None, "tensor", (0,))[0]
    lengths = found.diagonal().sqrt()
    sine = torch.sqrt(1 - (found[0, 1] / lengths.prod()) ** 2)
    exact = (other.double() - first.double()).norm() / first.double().norm()
    assert float(sine) == pytest.approx(float(exact), rel=0.2)
