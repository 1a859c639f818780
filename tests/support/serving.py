"""``mergeyard serve`` in a process of its own, with what it says kept apart from what it logs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).parents[2]
_LISTENS = "listens on "
_PATIENCE_SECONDS = 60


@dataclass
class Served:
    """A running service.

    Attributes:
        url: Where it listens.
        output: Lines that it had printed when it listened.
        client: With the administrator's token.
    """

    process: subprocess.Popen[str]
    url: str
    output: list[str]
    client: httpx.Client

    def terminate(self) -> int:
        """Ask it to end; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_PATIENCE_SECONDS)


def environment(folder: Path, **settings: object) -> dict[str, str]:
    """Environment of a service whose data and storage root are in ``folder``."""
    chosen = {"data_dir": folder / "data", "storage_roots": folder, "pool": "local", **settings}
    ours = {f"MERGEYARD_{name.upper()}": str(value) for name, value in chosen.items()}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MERGEYARD_")}
    return {**kept, "MERGEYARD_PORT": "0", **ours, "OMP_NUM_THREADS": "1"}


@contextmanager
def served(folder: Path, **settings: object) -> Iterator[Served]:
    """Start a service and wait until it listens; it is killed at the end if it still runs."""
    log = folder / "service.log"
    with log.open("a") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "serve"],
            cwd=REPOSITORY,
            env=environment(folder, **settings),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    guard = threading.Timer(_PATIENCE_SECONDS, process.kill)
    guard.start()
    assert process.stdout is not None
    try:
        output = []
        for line in process.stdout:
            output.append(line)
            if _LISTENS in line:
                break
        guard.cancel()
        assert output, log.read_text()
        assert _LISTENS in output[-1], (output, log.read_text())
        url = output[-1].rpartition(_LISTENS)[2].strip()
        token = (folder / "data" / "admin-token").read_text().strip()
        headers = {"Authorization": f"Bearer {token}"}
        with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
            yield Served(process, url, output, client)
    finally:
        guard.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
