"""Sums in whole numbers are those of all terms, whatever parts these come in."""

from __future__ import annotations

import math

import pytest
import torch

from merging.ops.exact_sums import exact_sum, from_words, to_words


@pytest.mark.parametrize("power", [-149, -60, 0, 100])
def test_parts_add_up_to_the_sum_of_all(power: int) -> None:
    generator = torch.Generator().manual_seed(power + 200)
    spread = torch.randint(-20, 20, (1000,), generator=generator)
    numbers = torch.ldexp(torch.rand(1000, generator=generator), spread + power).tolist()
    squares = [number * number for number in numbers]
    for terms in (numbers, squares):
        parts = torch.tensor([to_words(terms[start::7]) for start in range(7)])
        assert from_words(parts.sum(dim=0).tolist()) == exact_sum(terms) == math.fsum(terms)


def test_nothing_adds_up_to_0() -> None:
    assert from_words(to_words([])) == exact_sum([]) == 0


@pytest.mark.parametrize("strange", [math.inf, math.nan])
def test_a_term_that_is_not_finite_is_not_lost(strange: float) -> None:
    words = torch.tensor([to_words([1.0, strange]), to_words([2.0])]).sum(dim=0)
    assert math.isnan(from_words(words.tolist()))
    assert math.isnan(exact_sum([1.0, strange, 2.0]))
