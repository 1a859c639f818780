"""How many similar things are told."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 10
"""How many of many similar faults are spelled out."""


def shorten_list(items: Sequence[str]) -> str:
    """The first ten items, and how many there are beside them."""
    shown = ", ".join(items[:SHOWN])
    rest = len(items) - SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
