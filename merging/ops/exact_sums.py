"""Exact sums of float64 numbers: the same in whatever parts these come, and in any order.

A sum is a whole number of 2⁻³⁰⁰, of which float32 numbers, their squares, and float64 sums of
either are multiples. It is stored as words of 32 bits with room for carries, so that parts add up
as whole numbers do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

_POWER = 300
_WORD_BITS = 32
_NUM_WORDS = 20
"""Up to 2³⁴⁰: squares of float32 numbers are below 2²⁵⁶."""

SUM_WORDS = _NUM_WORDS + 1
"""Whole numbers of one sum; the last one counts terms that are not finite."""


def exact_sum(terms: Iterable[float]) -> float:
    """The float64 nearest to the sum of terms that are not negative; NaN if one is not finite."""
    total = math.fsum(terms)
    return total if math.isfinite(total) else math.nan


def to_words(terms: Iterable[float]) -> list[int]:
    """The sum of terms that are not negative, as :data:`SUM_WORDS` whole numbers."""
    total = strange = 0
    for term in terms:
        if math.isfinite(term):
            total += int(math.ldexp(term, _POWER))
        else:
            strange += 1
    shifts = range(0, _NUM_WORDS * _WORD_BITS, _WORD_BITS)
    return [*((total >> shift) & (2**_WORD_BITS - 1) for shift in shifts), strange]


def from_words(words: Sequence[int]) -> float:
    """What :func:`exact_sum` gives for all terms together."""
    *parts, strange = words
    total = sum(part << (_WORD_BITS * place) for place, part in enumerate(parts))
    return math.nan if strange else total / 2**_POWER
