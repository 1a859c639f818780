"""Outputs that must not be written at the same time."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa


def overlap(one: Any, other: Any) -> sa.ColumnElement[bool]:
    """Whether two normalised addresses are the same, or one is inside the other.

    The variants of a sweep are published inside its output.
    """
    return sa.or_(one == other, _is_inside(one, other), _is_inside(other, one))


def _is_inside(inner: Any, outer: Any) -> sa.ColumnElement[bool]:
    folder = sa.type_coerce(outer, sa.Text) + "/"
    return sa.func.substr(inner, 1, sa.func.length(folder)) == folder
