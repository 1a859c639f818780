"""The command line in this process: quick, and with what it says caught."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

from service import cli


@dataclass(frozen=True)
class Said:
    """How a command ended and what it said.

    Attributes:
        status: Exit status.
        out: Standard output.
        err: Standard error.
    """

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a refusal, without its ``error:``.

        All the other lines tell of single faults; nothing was printed as a result.
        """
        assert self.status == 1, self
        assert self.out == ""
        first, *others = self.err.splitlines()
        assert all(line.startswith("  - ") for line in others), self.err
        assert first.startswith("error: ")
        return first.removeprefix("error: ")

    @property
    def faults(self) -> list[str]:
        """The indented lines below the error."""
        return [line.removeprefix("  - ") for line in self.err.splitlines()[1:]]


def mergeyard(*arguments: object, stdin: bytes = b"") -> Said:
    """Run ``mergeyard`` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    status: object = 0
    with (
        mock.patch.object(sys, "argv", ["mergeyard", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code
    assert isinstance(status, int)
    return Said(status, out.getvalue(), err.getvalue())
