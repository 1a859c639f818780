"""A real MLflow server on SQLite, in an environment of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support.environments import plain_environment, python_with

VERSION = "3.17.2"
_START_SECONDS = 120


@dataclass(frozen=True)
class MlflowServer:
    """A running server."""

    url: str

    def client(self, program: str) -> str:
        """What a program prints that runs with MLflow's own client, as ``client``."""
        start = f"from mlflow import MlflowClient; client = MlflowClient({self.url!r})\n"
        done = subprocess.run(
            [_python(), "-c", start + program],
            env=_variables(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    """Start a server with its database in ``folder``; skips where MLflow cannot be installed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        _python(), "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    log = folder / "mlflow.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=_variables(),
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that its workers can be ended with it
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield MlflowServer(url)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _python() -> str:
    return str(python_with("mlflow", VERSION))


def _variables() -> dict[str, str]:
    return plain_environment(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")
