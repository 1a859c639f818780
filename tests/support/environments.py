"""Python environments of other people's packages, whose pins are not ours.

Each is made once, in ``.cache``, by the first test that needs it: some minutes, then seconds.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import REPOSITORY

_CACHE = REPOSITORY / ".cache"


def python_with(package: str, version: str, *before: str) -> Path:
    """The Python of an environment with a package; skips where it cannot be installed.

    ``before`` are requirements to install before, one after another, if they can be had: a smaller
    build of something, a version that the package works with.
    """
    environment = _CACHE / f"{package}-{version}"
    python, ready = environment / "bin" / "python", environment / "ready"
    _CACHE.mkdir(exist_ok=True)
    with (_CACHE / f"{environment.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of tests that run at once, one makes it
        if ready.exists():
            return python
        made = [sys.executable, "-m", "venv", "--clear", str(environment)]
        installed = [str(python), "-m", "pip", "install", "--quiet", f"{package}=={version}"]
        subprocess.run(made, check=True)
        for requirement in before:
            subprocess.run([*installed[:-1], requirement], capture_output=True)
        done = subprocess.run(installed, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{package} cannot be installed here: {done.stderr.strip()[-300:]}")
        ready.touch()
    return python


def plain_environment(**variables: str) -> dict[str, str]:
    """Of a child process: what programs need, nothing of ours, and what is given."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {**kept, **variables}
