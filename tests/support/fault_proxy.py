"""A proxy of our own in front of a real S3 server, which does to requests what networks do.

It passes bytes on as they are (signatures cover the host, so the client must be given the proxy's
address), one request per connection, and meets every so manieth request with a fault.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from itertools import count

_HEAD_LIMIT = 1 << 16
_CHUNK = 1 << 16
_ERROR = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>Not now.</Message>'
    "<Resource>/</Resource><RequestId>0</RequestId></Error>"
)


class Fault(StrEnum):
    """What can happen to a request."""

    SLOW_DOWN = "503 SlowDown"
    TOO_MANY = "429 TooManyRequests"
    INTERNAL = "500 InternalError"
    RESET = "reset before the request is passed on"
    LOSE_ANSWER = "reset after the server has done what was asked"
    TRUNCATE = "the answer's body breaks off"
    STALL = "no answer, ever"


Matches = Callable[[str, str], bool]
"""Whether a request (method and target) may meet a fault."""


@dataclass
class FaultProxy:
    """A running proxy.

    Attributes:
        endpoint: Its address.
        faults: What happens, in turn.
        every: To every so manieth request; 0 lets all pass.
        matches: Of those that this picks.
        met: How often each fault was met.
    """

    endpoint: str
    upstream: tuple[str, int]
    faults: tuple[Fault, ...] = ()
    every: int = 0
    matches: Matches = lambda method, target: True

    def __post_init__(self) -> None:
        self.met: Counter[Fault] = Counter()
        self._numbers = count(1)
        self._in_turn = count()
        self._tasks: set[asyncio.Task[None] | None] = set()

    def set(self, *faults: Fault, every: int, matches: Matches | None = None) -> None:
        """From now on these faults happen."""
        self.faults, self.every = faults, every
        self.matches = matches or (lambda method, target: True)

    def choose(self, method: str, target: str) -> Fault | None:
        """What happens to the next request."""
        if not (self.every and self.faults and self.matches(method, target)):
            return None
        if next(self._numbers) % self.every:
            return None
        fault = self.faults[next(self._in_turn) % len(self.faults)]
        self.met[fault] += 1
        return fault

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: one request."""
        task = asyncio.current_task()
        self._tasks.add(task)  # the loop alone would let it be collected as garbage
        try:
            await self._serve(reader, writer)
        finally:
            self._tasks.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError), closing(writer):
            head = await reader.readuntil(b"\r\n\r\n")
            method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
            fault = self.choose(method, target)
            if fault is Fault.STALL:
                await reader.read()  # until the client has had enough
            elif fault is Fault.RESET:
                _reset(writer)
            elif fault is not None and fault.value[:3].isdigit():
                await _refuse(reader, writer, head, fault)
            else:
                await self._pass_on(reader, writer, head, fault)

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        head: bytes,
        fault: Fault | None,
    ) -> None:
        upstream, to_server = await asyncio.open_connection(*self.upstream, limit=_HEAD_LIMIT)
        # Closing after each answer spares this proxy to know where answers end.
        to_server.write(head[:-2] + b"Connection: close\r\n\r\n")
        sending = asyncio.create_task(_copy(reader, to_server))
        try:
            with closing(to_server):
                if fault is Fault.LOSE_ANSWER:
                    await upstream.read()
                    _reset(writer)
                elif fault is Fault.TRUNCATE:
                    answer = await upstream.read()
                    start = answer.find(b"\r\n\r\n") + 4
                    writer.write(answer[: start + (len(answer) - start) // 2])
                    await writer.drain()
                    _reset(writer)
                else:
                    await _copy(upstream, writer)
        finally:
            sending.cancel()


@contextmanager
def fault_proxy(endpoint: str, address: str = "127.0.0.1") -> Iterator[FaultProxy]:
    """A proxy in front of ``http://host:port``, in a thread, for the length of the block.

    Args:
        endpoint: Where it passes on to.
        address: Where it listens: one of this machine's.
    """
    host, _, port = endpoint.removeprefix("http://").partition(":")
    loop = asyncio.new_event_loop()
    with socket.create_server((address, 0)) as listener:
        proxy = FaultProxy(
            f"http://{address}:{listener.getsockname()[1]}", upstream=(host, int(port))
        )
        start = asyncio.start_server(proxy.serve, sock=listener, limit=_HEAD_LIMIT)
        server = loop.run_until_complete(start)
        thread = threading.Thread(target=loop.run_forever, name="fault-proxy")
        thread.start()
        try:
            yield proxy
        finally:
            asyncio.run_coroutine_threadsafe(_close(server), loop).result(30)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


async def _close(server: asyncio.Server) -> None:
    server.close()
    rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()


async def _refuse(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes, fault: Fault
) -> None:
    lines = head.decode("latin-1").lower().split("\r\n")
    lengths = [int(line.split(":")[1]) for line in lines if line.startswith("content-length:")]
    if lengths and not any(line.startswith("expect:") for line in lines):
        await reader.readexactly(lengths[0])
    status, code = fault.value.split()
    body = _ERROR.format(code=code).encode()
    writer.write(
        f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
        + body
    )
    await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST in place of FIN."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
