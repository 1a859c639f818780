"""A pool of Ray workers, driven through a process of its own (see :mod:`workers.ray_driver`)."""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import msgspec
import structlog

from merging.errors import MergeError, WorkerError
from workers.in_flight import InFlight, cancelled_error, drain
from workers.messages import PoolEvent, ShardFailed, ShardTask
from workers.ray_wire import (
    Cancel,
    Command,
    Connected,
    Lost,
    Notice,
    RayOptions,
    Slots,
    Start,
    Submit,
    decode_notice,
    encode,
)
from workers.shard_task import ENGINE

_SECONDS_TO_CLOSE = 30.0
_LONGEST_BACKOFF = 30.0


class RayPool:
    """A :class:`workers.pool.ShardPool` on Ray.

    Ray is started or joined on first use. When it is lost, tasks in flight end as
    ``worker_lost``, and the next use connects anew, at growing intervals while that fails.

    Args:
        options: How to reach Ray, and what a task takes of it.
        engine: Dotted path of the function that produces a shard; resolved in the workers.
    """

    def __init__(self, options: RayOptions | None = None, *, engine: str = ENGINE) -> None:
        self._options = options or RayOptions()
        self._engine = engine
        self._notices: queue.SimpleQueue[tuple[_DriverProcess, Notice]] = queue.SimpleQueue()
        self._in_flight = InFlight()
        self._ready: deque[PoolEvent] = deque()
        self._driver: _DriverProcess | None = None
        self._connected_at: float | None = None
        self._address: str | None = None
        self._closed = False
        self._slots = 0
        self._failures = 0
        self._retry_at = 0.0
        self._reason = ""

    @property
    def address(self) -> str | None:
        """``host:port`` of the Ray in use, None while there is none."""
        return self._address

    def slots(self) -> int:
        """See :meth:`workers.pool.ShardPool.slots`; 0 while Ray is out of reach."""
        with contextlib.suppress(WorkerError):
            self._connect()
        self._take(0)
        return self._slots

    def submit(self, task: ShardTask) -> None:
        """See :meth:`workers.pool.ShardPool.submit`.

        Raises:
            WorkerError: ``worker_lost`` (retryable) if Ray cannot be reached.
        """
        driver = self._connect()
        self._in_flight.add(task)
        driver.send(Submit(task))

    def poll(self, timeout: float) -> list[PoolEvent]:
        """See :meth:`workers.pool.ShardPool.poll`."""
        self._take(0 if self._ready else timeout)
        events = list(self._ready)
        self._ready.clear()
        return events

    def cancel(self, job_id: str, *, now: bool = False) -> None:
        """See :meth:`workers.pool.ShardPool.cancel`."""
        for _, shard_index in self._in_flight.cancel(job_id):
            if self._driver is not None:
                self._driver.send(Cancel(job_id, shard_index, now))

    def close(self) -> None:
        """See :meth:`workers.pool.ShardPool.close`; the ends of tasks can still be polled."""
        self._closed = True
        driver = self._driver
        self._forget()
        if driver is not None:
            driver.close()
            self._take(0)
        self._ready.extend(self._in_flight.fail_all(cancelled_error()))

    def _connect(self) -> _DriverProcess:
        """The driver process, connected to Ray."""
        self._take(0)
        if self._driver is not None:
            return self._driver
        if self._closed:
            raise WorkerError("The pool is closed.")
        wait = self._retry_at - time.monotonic()
        if wait > 0:
            raise _lost(f"{self._reason} Trying again in {wait:.0f} s.")
        begin = time.monotonic()
        try:
            driver = _DriverProcess(self._options, self._engine, self._notices)
        except OSError as error:
            raise WorkerError(
                f"The process that talks to Ray cannot be started: {error}"
            ) from error
        self._driver = driver
        while self._connected_at is None:
            left = begin + self._options.start_timeout - time.monotonic()
            if left <= 0:
                self._lose(driver, "Ray did not start in time.")
            else:
                self._take(left)
            if self._driver is None:
                raise _lost(self._reason)
        return driver

    def _take(self, timeout: float) -> None:
        """Take in what the driver said, waiting up to ``timeout`` seconds for something."""
        for driver, notice in drain(self._notices, timeout):
            if isinstance(notice, PoolEvent):
                event = _told_as_cancelled(notice) if self._closed else notice
                self._ready.extend(self._in_flight.accept_all([event]))
            elif driver is not self._driver:
                continue  # the last words of one that was given up
            elif isinstance(notice, Slots):
                self._slots = notice.count
            elif isinstance(notice, Connected):
                self._connected_at = time.monotonic()
                self._address = notice.address
                self._slots = notice.slots
                structlog.get_logger(__name__).info(
                    "ray_connected", address=notice.address, session=notice.session
                )
            else:
                self._lose(driver, notice.detail)

    def _forget(self) -> None:
        self._driver = None
        self._connected_at = None
        self._address = None
        self._slots = 0

    def _lose(self, driver: _DriverProcess, reason: str) -> None:
        """Give up the driver; everything in flight is lost, and a new one will be started."""
        driver.kill()
        now = time.monotonic()
        if self._connected_at is not None and now - self._connected_at > _LONGEST_BACKOFF:
            self._failures = 0
        self._retry_at = now + min(2.0**self._failures, _LONGEST_BACKOFF)
        self._failures += 1
        self._forget()
        self._reason = reason
        self._ready.extend(self._in_flight.fail_all(_lost(reason)))
        structlog.get_logger(__name__).warning("ray_lost", reason=reason)


class _DriverProcess:
    """A child that runs :mod:`workers.ray_driver`, and the threads that listen to it."""

    def __init__(
        self,
        options: RayOptions,
        engine: str,
        notices: queue.SimpleQueue[tuple[_DriverProcess, Notice]],
    ) -> None:
        self._notices = notices
        self._process = subprocess.Popen(
            # -P: a folder named like one of our packages where the user stands is not ours.
            [sys.executable, "-P", "-m", "workers.ray_driver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | _ray_environment(options),
            process_group=0,  # Ctrl-C is for us; the child ends when its stdin does
        )
        self._readers = [
            threading.Thread(target=read, name="ray-driver", daemon=True)
            for read in (self._read, self._read_errors)
        ]
        for reader in self._readers:
            reader.start()
        self.send(Start(options, engine))

    def send(self, command: Command) -> None:
        """Say something. If the child is gone, its end comes (or has come) as a notice."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(encode(command))
            self._process.stdin.flush()

    def close(self) -> None:
        """Let the child cancel what it runs and end, then make sure of it."""
        self._close_input()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_SECONDS_TO_CLOSE)
        self.kill()

    def kill(self) -> None:
        """End the child and, with its process group, all of a local Ray."""
        self._close_input()
        # Unless it has been waited for, a child keeps its group from being another's.
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for reader in self._readers:
            reader.join()

    def _close_input(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            for line in stdout:
                try:
                    notice = decode_notice(line)
                except msgspec.MsgspecError:
                    break
                self._notices.put((self, notice))
        self._notices.put((self, Lost("The process that talks to Ray has ended.")))

    def _read_errors(self) -> None:
        """Bring what Ray prints into our log."""
        assert self._process.stderr is not None
        log = structlog.get_logger(__name__)
        with self._process.stderr as stderr:
            for line in stderr:
                log.info("ray_message", text=line.decode(errors="replace").rstrip())


def _told_as_cancelled(event: PoolEvent) -> PoolEvent:
    """While a pool closes, a worker fails (at work, or still starting) because it was ended."""
    if isinstance(event, ShardFailed) and event.error["type"] == WorkerError.__name__:
        return msgspec.structs.replace(event, error=cancelled_error().to_dict())
    return event


def _ray_environment(options: RayOptions) -> dict[str, str]:
    """Ray's switches. Token authentication is on unless the environment says otherwise."""
    switches = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
    }
    if options.token_path is not None:
        if options.address is None:
            _make_token(Path(options.token_path))
        switches["RAY_AUTH_TOKEN_PATH"] = options.token_path
    elif options.address is None:
        switches["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return switches


def _make_token(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))


def _lost(detail: str) -> MergeError:
    return WorkerError(detail, retryable=True)
