"""The HTTP server around the application: binding, and ending in good order."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from merging.errors import MergeError
from service.api.deps import Services
from service.settings import ENV_PREFIX

_GRACE_SECONDS = 10
"""How long answers in progress may take after the server was asked to end."""

_BACKLOG = 512

_SWITCH_SECONDS = 0.0005
"""How long a thread that plans or reads rows may keep the interpreter while the event loop wants
it: an answer needs it several times, and Python's own 5 milliseconds add up."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        MergeError: ``bad_setting``: the port is taken, or the address is not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # The protocol is named because asyncio sets TCP_NODELAY only on sockets that name it:
        # without, each answer waits 40 ms for the client's delayed acknowledgement.
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> MergeError:
    reasons = {
        errno.EADDRINUSE: "another process listens there",
        errno.EACCES: "this user may not use the port",
    }
    reason = reasons.get(error.errno or 0, error.strerror or str(error))
    return MergeError(
        f"The service cannot listen on {host}, port {port}: {reason}. Choose another with"
        f" --port or {ENV_PREFIX}PORT (0 takes a free one).",
        code="bad_setting",
    )


def address_of(listener: socket.socket, root_path: str = "") -> str:
    """The address to open in a client on this machine."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared with, not bound to
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{root_path}"


def prepare_process() -> None:
    """Let no answer of this process wait long for its other work; once all is loaded.

    What is there by now stays, so that the garbage collector need not look at it again: passes
    through a hundred thousand objects stop everything for tens of milliseconds.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.collect()
    gc.freeze()


class Server(uvicorn.Server):
    """Uvicorn, except for how it ends.

    Asked to, it first reports that it is not ready, then (after the delay) ends event streams,
    waits for other answers, and returns, so that the caller can put the rest away.

    Args:
        app: Made by :func:`service.app.create_app`.
        delay_seconds: Between reporting and ending.
    """

    def __init__(self, app: FastAPI, *, delay_seconds: float = 0) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                lifespan="on",
                ws="none",
                timeout_graceful_shutdown=_GRACE_SECONDS,
            )
        )
        services = app.state.services
        assert isinstance(services, Services)
        self.services = services
        self._delay_seconds = delay_seconds
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until asked to stop."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def request_stop(self) -> None:
        """Begin to end; from any thread. The second time the delay is skipped."""
        is_repeat = self.services.stopping.is_set()
        self.services.stopping.set()
        if self._loop is None or self._loop.is_closed():
            self.should_exit = True
        else:
            delay = 0 if is_repeat else self._delay_seconds
            self._loop.call_soon_threadsafe(self._loop.call_later, delay, self._end)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - overrides
        """On SIGTERM and SIGINT.

        Uvicorn's own handler would raise the signal again once it is done, which ends the process
        before the runner has given its jobs back.
        """
        self.request_stop()

    def _end(self) -> None:
        self.services.feed.close()
        self.services.news.close()
        self.should_exit = True
