"""The k-th largest of values in blocks is that of the sorted values, whatever these are."""

from collections.abc import Callable, Iterator

import pytest
import torch

from merging.ops.selection import ALL, NONE, Rank, find_thresholds, sample_of

KINDS: dict[str, Callable[[int], torch.Tensor]] = {
    "all different": lambda n: torch.rand(n, generator=torch.Generator().manual_seed(n)),
    "few different": lambda n: torch.arange(n) % 11 / 16,
    "mostly zeros": lambda n: (
        torch.rand(n, generator=torch.Generator().manual_seed(n)) * (torch.arange(n) % 3 == 0)
    ),
    "all equal": lambda n: torch.full((n,), 0.5),
    "sorted": lambda n: torch.arange(n) / n,
}


def in_blocks(values: torch.Tensor, size: int) -> Callable[[], Iterator[torch.Tensor]]:
    return lambda: iter(values.split(size))


def rank_of(share: float) -> Rank:
    return lambda size: max(1, int(share * size))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 1000, 600_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_sorted_ones(size: int, kind: str, dtype: torch.dtype) -> None:
    values = KINDS[kind](size).to(dtype)
    ordered = values.sort(descending=True).values
    sample = sample_of(values)
    ranks = [rank_of(share) for share in (1e-9, 0.01, 0.2, 0.5, 0.999)]
    is_whole = len(sample) == size
    for shared in (ranks, ranks[::-1], ranks[:1]):
        found = find_thresholds(in_blocks(values, 70_000), sample, shared, is_whole=is_whole)
        for rank, (value, ties) in zip(shared, found, strict=True):
            assert value == ordered[rank(size) - 1]
            assert ties == rank(size) - int((values > value).sum())


@pytest.mark.parametrize("size", [1000, 600_000])
def test_none_and_all_of_the_values_need_no_threshold(size: int) -> None:
    values = KINDS["all different"](size)
    sample = sample_of(values)
    for is_whole in {False, len(sample) == size}:
        found = find_thresholds(
            in_blocks(values, 70_000), sample, [lambda _: 0, lambda n: n], is_whole=is_whole
        )
        assert found == [NONE, ALL]


@pytest.mark.parametrize("k", [1, 5_000, 300_000, 599_999])
@pytest.mark.parametrize("misleading", [0.0, 0.3, 2.0])
def test_a_sample_that_misleads_costs_passes_and_not_exactness(k: int, misleading: float) -> None:
    values = KINDS["all different"](600_000)
    sample = torch.full((1000,), misleading)
    ranks = [lambda n: min(k, n), lambda n: n // 2]
    (value, ties), (middle, _) = find_thresholds(in_blocks(values, 70_000), sample, ranks)
    ordered = values.sort(descending=True).values
    assert (value, middle) == (ordered[k - 1], ordered[300_000 - 1])
    assert ties == k - int((values > value).sum())


@pytest.mark.parametrize("k", [1, 2, 400_000, 599_999])
def test_values_that_are_no_numbers_count_as_largest(k: int) -> None:
    values = KINDS["all different"](600_000)
    values[7], values[9] = torch.nan, torch.inf
    sample = sample_of(values)
    [(value, _)] = find_thresholds(in_blocks(values, 70_000), sample, [lambda n: min(k, n)])
    expected = values[torch.isfinite(values)].sort(descending=True).values
    assert value == (torch.inf if k <= 2 else expected[k - 3])


def test_a_sample_leaves_no_column_of_a_matrix_out() -> None:
    columns = torch.arange(64).repeat(1 << 16)
    assert len(sample_of(columns).unique()) == 64
