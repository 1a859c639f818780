"""The service as its users see it: a process that is started, and an API that is called."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]  # no stubs are installed
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from examples.demo.errors import DemoError
from examples.demo.places import Place
from examples.demo.recipes import Merge
from service.client import ApiError, Client

_READY_SECONDS = 120.0
_STOP_SECONDS = 30.0
_POLL_SECONDS = 0.1
_OUTPUT_FILE_SIZE = "1MB"  # several shards even of a small model

_Message = tuple[str, dict[str, Any] | ApiError | None]


class Service:
    """A running ``mergeyard serve``.

    Attributes:
        client: With the administrator's token.
        url: Where it listens.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self.url = ""
        self.client: Client

    def check(self) -> None:
        """Raise :class:`DemoError`, with the end of its log, if it has ended."""
        if self._process.poll() is not None:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise DemoError(f"The service ended by itself. Its last lines:\n{tail}")

    def wait_until_ready(self, token_file: Path) -> None:
        """Until it says where it listens, and that it is ready."""
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline:
            self.check()
            found = re.search(r"listens on (http://\S+)", self._log.read_text(errors="replace"))
            if found and _answers(f"{found[1]}/readyz"):
                self.url = found[1]
                self.client = Client(self.url, token_file.read_text().strip())
                return
            time.sleep(_POLL_SECONDS)
        raise DemoError(f"The service was not ready after {_READY_SECONDS:.0f} seconds.")

    def stop(self) -> None:
        """Ask it to end, wait, and end what is left of it and of what it started."""
        try:
            family = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _, alive = psutil.wait_procs(family, timeout=3)
        for process in alive:
            process.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


@contextmanager
def running_service(folder: Path, place: Place) -> Iterator[Service]:
    """The service on its embedded default (SQLite, a Ray of its own), ended with the block.

    Args:
        folder: For its data and log.
        place: The only storage that its jobs may use.

    Raises:
        DemoError: It did not start.
    """
    log = folder / "service.log"
    data = folder / "data"
    # Nothing of what the user has set up for other services and servers.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MERGEYARD_"))}
    settings = ["--port", "0", "--data-dir", str(data), "--storage-root", place.root]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "serve", *settings],
            env={**kept, **place.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches this process, which then ends the service
        )
    service = Service(process, log)
    try:
        service.wait_until_ready(data / "admin-token")
        # The client stays open: after Ctrl-C, threads read from it until the process ends.
        yield service
    finally:
        service.stop()


def run_merges(
    service: Service, place: Place, merges: Sequence[Merge], console: Console
) -> dict[str, str]:
    """Submit all merges at once and show their event streams until the last is finished.

    Returns:
        Where each merged checkpoint is in ``place``, by title.

    Raises:
        DemoError: A merge failed.
    """
    names = {merge.title: f"merged/{merge.method}" for merge in merges}
    messages: queue.Queue[_Message] = queue.Queue()
    with _bars(console) as progress:
        bars = {}
        jobs = {}
        for merge in merges:
            job = _submit(service.client, merge, place, names[merge.title])
            jobs[merge.title] = job["id"]
            bars[merge.title] = progress.add_task(merge.title, total=None, note=job["state"])
            arguments = (service.client, merge.title, job["id"], messages)
            # A daemon: after Ctrl-C nobody waits for it.
            threading.Thread(target=_follow, args=arguments, daemon=True).start()
        for title, event in _until_finished(service, set(jobs), messages):
            if event["type"] == "job.state_changed":
                progress.update(bars[title], note=event["data"]["to"])
            elif event["type"] == "job.progress":
                counts = event["data"]["progress"]
                note = f"{counts['tensors_done']}/{counts['tensors_total']} tensors"
                done, total = counts["bytes_done"], counts["bytes_total"]
                progress.update(bars[title], completed=done, total=total, note=note)
    for title, job_id in jobs.items():
        job = service.client.job(job_id)
        if job["state"] != "succeeded":
            raise DemoError(f"{title}: {job['state']}: {(job['error'] or {}).get('detail', '')}")
    return names


def _submit(client: Client, merge: Merge, place: Place, name: str) -> dict[str, Any]:
    try:
        return client.submit(
            merge.recipe(f"{place.root}/models"),
            f"{place.root}/{name}",
            options={"max_shard_size": _OUTPUT_FILE_SIZE},
        )
    except ApiError as error:
        raise DemoError(f"{merge.title}: {error}") from error


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("  {task.description:<14}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def _follow(client: Client, title: str, job_id: str, messages: queue.Queue[_Message]) -> None:
    try:
        for event in client.events(job_id):
            messages.put((title, event))
        messages.put((title, None))
    except ApiError as error:
        messages.put((title, error))


def _until_finished(
    service: Service, titles: set[str], messages: queue.Queue[_Message]
) -> Iterator[tuple[str, dict[str, Any]]]:
    while titles:
        try:
            title, message = messages.get(timeout=1)
        except queue.Empty:
            service.check()
            continue
        if isinstance(message, ApiError):
            raise DemoError(f"{title}: {message}") from message
        if message is None:
            titles.discard(title)
        else:
            yield title, message
