from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from merging.ops.quantiles import (
    Row,
    choose_coarse,
    choose_fine,
    count_coarse,
    count_fine,
    magnitudes,
    read_thresholds,
)
from merging.ops.selection import first_beyond_largest, last_of_largest


def task_vector(size: int, kind: str) -> torch.Tensor:
    values = 1e-3 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    if kind == "coarse":  # as differences of bfloat16 weights: few different magnitudes
        return (values + 1).bfloat16().float() - 1
    if kind == "zeros":
        return values * (torch.arange(size) % 3 == 0)
    return values


@pytest.mark.parametrize("keeps_ties", [True, False])
@pytest.mark.parametrize("kind", ["fine", "coarse", "zeros"])
def test_thresholds_over_parts_and_tiles_are_those_of_the_whole(
    kind: str, keeps_ties: bool
) -> None:
    """Two parts: one in tiles, with counts; a small one, with its patterns."""
    densities = [0.2, 0.7, 1.0]
    large = [task_vector(200_000 + n, kind)[:200_000] for n in range(3)]
    small = [task_vector(500 + n, kind)[:500] for n in range(3)]
    cuts = list(pairwise([0, 65_536, 131_072, 200_000]))

    def rows(vectors: list[torch.Tensor]) -> list[Row | None]:
        origin = torch.zeros(len(vectors[0]))
        return [
            magnitudes(origin, v) if d < 1 else None
            for v, d in zip(vectors, densities, strict=True)
        ]

    def parts(count: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        tiles = [count(rows([t[a:b] for t in large]), b - a, is_tile=a > 0) for a, b in cuts]
        return [torch.stack(tiles).sum(dim=0), count(rows(small), 500, is_tile=False)]

    rank = first_beyond_largest if keeps_ties else last_of_largest
    device = torch.device("cpu")
    coarse = parts(lambda found, size, **k: count_coarse(found, size, device, **k))
    chosen = choose_coarse(
        coarse, [rank(density) if density < 1 else None for density in densities]
    )
    fine = parts(lambda found, size, **k: count_fine(found, chosen, size, device, **k))
    found = read_thresholds(choose_fine(fine, chosen, keeps_ties=keeps_ties))
    thresholds, ties = zip(*found, strict=True)
    for expert, density in enumerate(densities[:2]):
        whole = torch.cat([large[expert], small[expert]]).abs()
        kept = int(density * whole.numel())
        if keeps_ties:
            assert thresholds[expert] == torch.kthvalue(whole, whole.numel() - kept).values
            assert ties[expert] == float("inf")
        else:
            assert thresholds[expert] == whole.sort(descending=True).values[kept - 1]
            assert ties[expert] == kept - int((whole > thresholds[expert]).sum())
    assert (thresholds[2], ties[2]) == (0, float("inf"))
