"""The service as users run it: ``mergeyard serve`` in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from service.client import Client

_READY_SECONDS = 90
_STOP_SECONDS = 30


class ServiceProcess:
    """A service over a data folder; it can be killed and started again on the same one.

    Args:
        data_dir: The folder.
        roots: Storage roots.
        environment: Added to this process's.
        prefix: What goes before the command, as to run it in other namespaces.
    """

    def __init__(
        self,
        data_dir: Path,
        roots: list[str],
        environment: Mapping[str, str],
        prefix: Sequence[str] = (),
    ) -> None:
        self.data_dir = data_dir
        self._prefix = prefix
        self._roots = roots
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._family: list[psutil.Process] = []
        self.url = ""

    @property
    def log(self) -> str:
        """What it has printed so far, over all its lives."""
        return (self.data_dir / "serve.log").read_text()

    @property
    def is_running(self) -> bool:
        """It was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def process(self) -> psutil.Process:
        """The serving process."""
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def client(self) -> Client:
        """A client with the administrator's token."""
        return Client(self.url, (self.data_dir / "admin-token").read_text().strip())

    def start(self) -> None:
        """Start it and wait until it is ready."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        arguments = ["--data-dir", str(self.data_dir), "--port", str(port)]
        for root in self._roots:
            arguments += ["--storage-root", root]
        with (self.data_dir / "serve.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._prefix, sys.executable, "-m", "service.cli", "serve", *arguments],
                env=os.environ | self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise RuntimeError(f"the service did not become ready:\n{self.log}")

    def descendants(self) -> list[psutil.Process]:
        """Its child processes, Ray and workers included, seen now or before."""
        with suppress(psutil.NoSuchProcess):
            self._family += self.process.children(recursive=True)
        self._family = list({process.pid: process for process in self._family}.values())
        return [process for process in self._family if process.is_running()]

    def kill(self) -> None:
        """End the serving process and all that it started, as a power cut would."""
        family = self.descendants()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for process in family:
            if process.is_running():
                process.kill()
        psutil.wait_procs(family, timeout=_STOP_SECONDS)

    def stop(self) -> int:
        """Ask it to end; returns its exit status."""
        assert self._process is not None
        self.descendants()
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(_STOP_SECONDS)
        finally:
            self.kill()


@contextmanager
def running_service(
    data_dir: Path, roots: list[str], environment: Mapping[str, str] | None = None
) -> Iterator[ServiceProcess]:
    """A started service, ended with the block whatever happens in it."""
    service = ServiceProcess(data_dir, roots, environment or {})
    try:
        service.start()
        yield service
    finally:
        service.kill()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
