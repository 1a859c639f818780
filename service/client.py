"""A small client of the REST API; the command line uses nothing else.

with Client("http://127.0.0.1:8000", token) as client:
    job = client.submit(recipe_text, "s3://models/merged")
    for event in client.events(job["id"]):
        print(event["type"], event["data"])
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import httpx

_RECONNECT_SECONDS = 1.0
_STREAM_SILENCE_SECONDS = 60.0


class ApiError(Exception):
    """The service answered with a problem, or could not be reached.

    Attributes:
        problem: The problem+json object (``code``, ``detail``, ``errors`` …).
    """

    def __init__(self, problem: Mapping[str, Any]) -> None:
        super().__init__(str(problem.get("detail") or problem.get("title") or "request failed"))
        self.problem = dict(problem)


class Client:
    """Talks to one service.

    Args:
        url: Address of the service, path prefix included.
        token: Bearer token.
        transport: For tests.
    """

    def __init__(
        self, url: str, token: str, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(60.0),
            transport=transport,
        )

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

    def submit(
        self,
        recipe: str | Mapping[str, Any],
        output_uri: str,
        *,
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> dict[str, Any]:
        """Submit a merge and return the job.

        A key is always sent, so that a request repeated after a lost reply makes no second job.

        Args:
            recipe: YAML or JSON text, or the parsed document.
            output_uri: Where the merged checkpoint goes.
            idempotency_key: Key of the caller's own, to repeat a submission safely across runs.
            fields: Other fields of the request: ``options``, ``labels``, ``priority`` …
        """
        body = {"type": "merge", "recipe": recipe, "output_uri": output_uri, **fields}
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return self._call("POST", "/v1/jobs", json=body, headers=headers)

    def job(self, job_id: str) -> dict[str, Any]:
        """One job."""
        return self._call("GET", f"/v1/jobs/{job_id}")

    def jobs(self, *, limit: int = 20, state: str | None = None) -> list[dict[str, Any]]:
        """The newest jobs."""
        parameters: dict[str, Any] = {"limit": limit}
        if state:
            parameters["state"] = state
        data = self._call("GET", "/v1/jobs", params=parameters)["data"]
        assert isinstance(data, list)
        return data

    def cancel(self, job_id: str, *, mode: str = "orderly") -> dict[str, Any]:
        """Cancel a job: ``orderly``, or ``now``."""
        return self._call("POST", f"/v1/jobs/{job_id}/cancel", json={"mode": mode})

    def plan(
        self, recipe: str | Mapping[str, Any], output_uri: str, **fields: Any
    ) -> dict[str, Any]:
        """What a job would do, without running it."""
        body = {"recipe": recipe, "output_uri": output_uri, **fields}
        return self._call("POST", "/v1/plans", json=body)

    def report(self, job_id: str) -> dict[str, Any]:
        """The merge report of a job that succeeded."""
        return self._call("GET", f"/v1/jobs/{job_id}/report")

    def events(self, job_id: str, *, after: int = 0) -> Iterator[dict[str, Any]]:
        """Every event of a job from ``after`` on, live, without gaps, until it is finished.

        A lost connection is taken up again where it broke.
        """
        last = after
        while True:
            try:
                for event in self._stream(job_id, last):
                    last = event["seq"]
                    yield event
                    if event["type"] == "job.finished":
                        return
                if self.job(job_id)["is_terminal"] and not self._has_events(job_id, last):
                    return
            except httpx.TransportError:
                pass
            time.sleep(_RECONNECT_SECONDS)

    def _has_events(self, job_id: str, after: int) -> bool:
        page = self._call("GET", f"/v1/jobs/{job_id}/events", params={"after": after})
        return bool(page["data"])

    def _stream(self, job_id: str, after: int) -> Iterator[dict[str, Any]]:
        headers = {"Accept": "text/event-stream"}
        if after:
            headers["Last-Event-ID"] = str(after)
        path = f"/v1/jobs/{job_id}/events"
        timeout = httpx.Timeout(60.0, read=_STREAM_SILENCE_SECONDS)
        with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
            if response.is_error:
                response.read()
            _raise_for_problem(response)
            for line in response.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line[5:])

    def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.TransportError as error:
            raise ApiError(
                {
                    "code": "unreachable",
                    "detail": f"No service answers at {self._http.base_url} ({error})."
                    " Start one with 'mergeyard serve', or name another with --url.",
                }
            ) from error
        _raise_for_problem(response)
        result = response.json()
        assert isinstance(result, dict)
        return result


def _raise_for_problem(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        problem = response.json()
    except ValueError:
        problem = {"detail": f"The server answered {response.status_code} without an explanation."}
    raise ApiError(problem if isinstance(problem, dict) else {"detail": str(problem)})
