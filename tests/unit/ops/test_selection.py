"""The k-th largest of values in blocks is that of the sorted values, whatever these are."""

from collections.abc import Callable, Iterator

import pytest
import torch

from merging.ops.selection import kth_largest, sample_of

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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 1000, 600_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_sorted_ones(size: int, kind: str, dtype: torch.dtype) -> None:
    values = KINDS[kind](size).to(dtype)
    ordered = values.sort(descending=True).values
    for k in {1, 1 + size // 100, 1 + size // 5, 1 + size // 2, size}:
        value, above = kth_largest(in_blocks(values, 70_000), sample_of(values), size, k)
        assert value == ordered[k - 1]
        assert above == int((values > value).sum())


@pytest.mark.parametrize("k", [1, 5_000, 300_000, 599_999])
@pytest.mark.parametrize("misleading", [0.0, 0.3, 2.0])
def test_a_sample_that_misleads_costs_passes_and_not_exactness(k: int, misleading: float) -> None:
    values = KINDS["all different"](600_000)
    sample = torch.full((1000,), misleading)
    value, above = kth_largest(in_blocks(values, 70_000), sample, values.numel(), k)
    assert value == values.sort(descending=True).values[k - 1]
    assert above == k - 1 or values[values == value].numel() > 1


@pytest.mark.parametrize("k", [1, 2, 400_000, 600_000])
def test_values_that_are_no_numbers_count_as_largest(k: int) -> None:
    values = KINDS["all different"](600_000)
    values[7], values[9] = torch.nan, torch.inf
    value, _ = kth_largest(in_blocks(values, 70_000), sample_of(values), values.numel(), k)
    expected = values[torch.isfinite(values)].sort(descending=True).values
    assert value == (torch.inf if k <= 2 else expected[k - 3])


def test_a_sample_leaves_no_column_of_a_matrix_out() -> None:
    columns = torch.arange(64).repeat(1 << 16)
    assert len(sample_of(columns).unique()) == 64
