"""Which entries of a tensor are one vector, where angles are between parts of tensors.

Planning asks how many vectors there are, so torch is not imported with this module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["tensor", "rows", "columns"]
"""The whole ``tensor``; its ``rows`` along the last dimension; ``columns`` along the first one.
A tensor of one dimension is one vector."""


class Part(NamedTuple):
    """Entries of some vectors that lie as lines of equal length.

    Attributes:
        entries: Where they are in the range that was asked about.
        vectors: Whose they are.
        shape: Lines × entries of a line.
    """

    entries: slice
    vectors: slice
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Vectors:
    """The vectors of one tensor.

    Attributes:
        count: How many.
        line: Entries from one line of the tensor to the next.
        are_columns: A line holds an entry of each vector, and not one vector.
    """

    count: int
    line: int
    are_columns: bool

    @classmethod
    def of(cls, shape: Sequence[int], kind: Kind) -> Vectors:
        """Those of a tensor of that shape."""
        num_entries = math.prod(shape)
        if kind == "tensor" or len(shape) < 2 or not num_entries:
            return cls(1, num_entries, are_columns=False)
        if kind == "rows":
            return cls(num_entries // shape[-1], shape[-1], are_columns=False)
        return cls(num_entries // shape[0], num_entries // shape[0], are_columns=True)

    def parts(self, start: int, end: int) -> Iterator[Part]:
        """Entries ``[start, end)`` of the flat tensor: whole lines, and what is before and after.

        Args:
            start: First entry.
            end: Entry after the last.
        """
        position = start
        while position < end:
            row, column = divmod(position, self.line)
            lines = 1 if column else max(1, (end - position) // self.line)
            length = min(self.line - column, end - position)
            entries = slice(position - start, position - start + lines * length)
            vectors = (
                slice(column, column + length) if self.are_columns else slice(row, row + lines)
            )
            yield Part(entries, vectors, (lines, length))
            position += lines * length
