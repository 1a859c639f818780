"""How the client sends requests, reads streams, and tells what went wrong."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx

from merging.errors import Fault, MergeError

_REQUEST_SECONDS = 60.0
"""Longest silence of the service; on streams it says something every 15."""


class ApiError(MergeError):
    """The service answered with a problem, or could not be reached (code ``unreachable``).

    Attributes:
        problem: The problem+json object (``code``, ``detail``, ``errors`` …).
    """

    def __init__(self, problem: Mapping[str, Any]) -> None:
        super().__init__(
            str(problem.get("detail") or problem.get("title") or "The request failed."),
            code=problem.get("code"),
            faults=[
                Fault(
                    str(item.get("pointer") or item.get("parameter") or ""),
                    str(item.get("code", "")),
                    str(item.get("detail", "")),
                )
                for item in problem.get("errors") or ()
            ],
            retryable=bool(problem.get("retryable")),
        )
        self.problem = dict(problem)


class HttpClient:
    """Connections to one service. Every request raises :class:`ApiError`.

    Args:
        url: Address of the service, path prefix included.
        token: Bearer token.
        transport: For tests.
    """

    def __init__(
        self, url: str, token: str, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        if not (token and token.isascii() and token.isprintable()):
            raise ApiError(
                {
                    "code": "unauthenticated",
                    "detail": "The token is empty, or has characters that no token has.",
                }
            )
        try:
            self._http = httpx.Client(
                base_url=url,
                headers={"Authorization": f"Bearer {token}"},
                timeout=_REQUEST_SECONDS,
                transport=transport,
            )
        except httpx.InvalidURL as error:
            raise _unreachable(url, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _stream(
        self, path: str, after: int | None, filters: Mapping[str, str | Sequence[str]] | None = None
    ) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Positions with their events; None where only the position moved on."""
        headers = {"Accept": "text/event-stream"}
        if after is not None:
            headers["Last-Event-ID"] = str(after)
        position, event = None, None
        for line in self._lines(path, headers=headers, params=filters):
            if line.startswith("data:"):
                event = json.loads(line[5:])
            elif line.startswith("id:"):
                position = int(line[3:])
            elif not line and position is not None:
                yield position, event
                position, event = None, None

    def _lines(
        self, path: str, *, silence_seconds: float | None = _REQUEST_SECONDS, **arguments: Any
    ) -> Iterator[str]:
        """Lines of a text as they come; ``silence_seconds``: longest wait for the next."""
        timeout = httpx.Timeout(_REQUEST_SECONDS, read=silence_seconds)
        try:
            with self._http.stream("GET", path, timeout=timeout, **arguments) as response:
                if response.is_error:
                    response.read()
                _raise_for_problem(response)
                yield from response.iter_lines()
        except httpx.RequestError as error:
            raise _unreachable(str(self._http.base_url), error) from error

    def _list(self, path: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._call("GET", path, params=parameters)["data"]
        return found

    def _create(self, path: str, body: Mapping[str, Any], key: str | None = None) -> dict[str, Any]:
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        return self._call("POST", path, json=body, headers=headers)

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **arguments)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise _unreachable(str(self._http.base_url), error) from error
        _raise_for_problem(response)
        return response

    def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        response = self._send(method, path, **arguments)
        try:
            result = response.json()
        except ValueError:
            result = None
        if not isinstance(result, dict):
            raise ApiError(
                {
                    "code": "unreachable",
                    "detail": f"What answers at {response.url} is not Mergeyard: status"
                    f" {response.status_code} without a JSON object. Name the service with --url.",
                }
            )
        return result


def _unreachable(url: str, error: Exception) -> ApiError:
    return ApiError(
        {
            "code": "unreachable",
            "detail": f"No service answers at {url} ({str(error).rstrip('.')})."
            " Start one with 'mergeyard serve', or name another with --url.",
        }
    )


def _raise_for_problem(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {"detail": f"The server answered {response.status_code} without an explanation."}
    raise ApiError(problem)
