"""A stand-in for an S3 server that misbehaves on order: breaks off bodies, throttles, lies.

It serves one object, honours Range and If-Match as S3 does, and counts what it was asked.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ETAG = '"stand-in"'


class MisbehavingS3(ThreadingHTTPServer):
    """See the module.

    Attributes:
        body: The object, at any address.
        cut_after: Bytes of body after which each of the next answers breaks off; then none does.
        statuses: Error statuses of the next answers; these come first.
        honours_ranges: Whether Range is looked at.
        honours_conditions: Whether If-Match is looked at.
        ranges: Range headers received, in order.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, body: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.body = body
        self.etag = ETAG
        self.cut_after: list[int] = []
        self.statuses: list[int] = []
        self.honours_ranges = True
        self.honours_conditions = True
        self.ranges: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Silent when the client hangs up first; anything else is a fault of this stand-in."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: MisbehavingS3
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        server.ranges.append(self.headers.get("Range", ""))
        if server.statuses:
            self._answer(server.statuses.pop(0), b"")
        elif server.honours_conditions and self.headers.get("If-Match", server.etag) != server.etag:
            self._answer(412, b"")
        elif server.honours_ranges and self.headers.get("Range"):
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            self._answer(206, server.body[int(first) : int(last) + 1])
        else:
            self._answer(200, server.body)

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        if status < 300 and self.server.cut_after:
            self.wfile.write(body[: self.server.cut_after.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: tests read the counters."""


@contextmanager
def misbehaving_s3(body: bytes) -> Iterator[MisbehavingS3]:
    """Run the stand-in for the length of a ``with`` block."""
    with MisbehavingS3(body) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
