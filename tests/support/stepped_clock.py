"""A clock that a test sets for the processes that it starts; its own stays right."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_suffix(".c")


class SteppedClock:
    """The time of day of processes with its ``environment``; needs a C compiler.

    Args:
        folder: For the library that is preloaded, and the file that says how far off the clock is.
    """

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("a clock of its own for a process needs a C compiler")
        library = folder / "stepped_clock.so"
        command = [compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(SOURCE)]
        subprocess.run(command, check=True)
        self._file = folder / "stepped_clock"
        self.environment = {"LD_PRELOAD": str(library), "STEPPED_CLOCK": str(self._file)}
        self.set(0)

    def set(self, seconds: int) -> None:
        """Let the clock be so far ahead of the truth from now on, at once for all threads."""
        new = self._file.with_suffix(".new")
        new.write_text(str(seconds))
        new.replace(self._file)
