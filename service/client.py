"""A small client of the REST API; the command line uses nothing else.

with Client("http://127.0.0.1:8000", token) as client:
    job = client.submit(recipe_text, "s3://models/merged")
    for event in client.events(job["id"]):
        print(event["type"], event["data"])
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from service.client_http import ApiError, HttpClient

__all__ = ["ApiError", "Client"]

_RECONNECT_SECONDS = 1.0
_PATIENCE_SECONDS = 300.0
"""How long a stream may find nobody to take it up again: time for a service to be replaced."""


class Client(HttpClient):
    """Talks to one service. Every call raises :class:`ApiError`."""

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
        return self._submit(body, idempotency_key)

    def run_plan(
        self, plan_id: str, *, idempotency_key: str | None = None, **fields: Any
    ) -> dict[str, Any]:
        """Submit exactly the merge of a plan; refused (``plan_outdated``) if an input changed."""
        return self._submit({"plan_id": plan_id, **fields}, idempotency_key)

    def _submit(self, body: Mapping[str, Any], key: str | None) -> dict[str, Any]:
        return self._create("/v1/jobs", body, key)

    def job(self, job_id: str) -> dict[str, Any]:
        """One job."""
        return self._call("GET", f"/v1/jobs/{job_id}")

    def jobs(
        self, *, limit: int = 20, state: str | None = None, search: str | None = None
    ) -> list[dict[str, Any]]:
        """The newest jobs; ``search``: words in their id, method, addresses, labels or error."""
        parameters: dict[str, Any] = {"limit": limit}
        if state:
            parameters["state"] = state
        if search:
            parameters["q"] = search
        return self._list("/v1/jobs", parameters)

    def shards(self, job_id: str) -> list[dict[str, Any]]:
        """The output files of a job, in order, with their progress."""
        return self._list(f"/v1/jobs/{job_id}/shards", {})

    def cancel(self, job_id: str, *, mode: str = "orderly") -> dict[str, Any]:
        """Cancel a job: ``orderly``, or ``now``."""
        return self._call("POST", f"/v1/jobs/{job_id}/cancel", json={"mode": mode})

    def retry(self, job_id: str) -> dict[str, Any]:
        """Queue a failed job again as its next attempt."""
        return self._call("POST", f"/v1/jobs/{job_id}/retry")

    def delete(self, job_id: str, *, output: str = "keep") -> None:
        """Forget a job that has ended; with ``output="delete"`` remove its checkpoint too."""
        self._send("DELETE", f"/v1/jobs/{job_id}", params={"output": output})

    def plan(
        self, recipe: str | Mapping[str, Any], output_uri: str, **fields: Any
    ) -> dict[str, Any]:
        """What a job would do, without running it; :meth:`run_plan` runs just that."""
        body = {"recipe": recipe, "output_uri": output_uri, **fields}
        return self._create("/v1/plans", body)

    def report(self, job_id: str) -> dict[str, Any]:
        """The merge report of a job that succeeded."""
        return self._call("GET", f"/v1/jobs/{job_id}/report")

    def logs(self, job_id: str, *, follow: bool = False) -> Iterator[str]:
        """Lines of a job's log; with ``follow`` until the job has ended."""
        path = f"/v1/jobs/{job_id}/logs"
        if follow:
            yield from self._lines(path, silence_seconds=None, params={"follow": "true"})
        else:
            yield from self._lines(path)

    def create_token(
        self, name: str, scopes: Sequence[str], *, expires_at: str | None = None
    ) -> dict[str, Any]:
        """Make a token; ``secret`` is in the answer, this once."""
        body = {"name": name, "scopes": list(scopes), "expires_at": expires_at}
        return self._create("/v1/tokens", body)

    def tokens(self) -> list[dict[str, Any]]:
        """All tokens, without their secrets."""
        return self._list("/v1/tokens", {})

    def revoke_token(self, token_id: str) -> dict[str, Any]:
        """Make a token useless."""
        return self._call("DELETE", f"/v1/tokens/{token_id}")

    def create_webhook(self, url: str, **fields: Any) -> dict[str, Any]:
        """Make a webhook endpoint: ``events``, ``format``, ``description``; with its secret."""
        return self._create("/v1/webhook-endpoints", {"url": url, **fields})

    def webhooks(self) -> list[dict[str, Any]]:
        """All webhook endpoints, without their secrets."""
        return self._list("/v1/webhook-endpoints", {})

    def test_webhook(self, endpoint_id: str) -> dict[str, Any]:
        """Have a signed sample sent; returns the delivery."""
        return self._call("POST", f"/v1/webhook-endpoints/{endpoint_id}/test")

    def deliveries(self, endpoint_id: str, *, limit: int = 20) -> list[dict[str, Any]]:
        """The newest deliveries of a webhook endpoint."""
        return self._list(f"/v1/webhook-endpoints/{endpoint_id}/deliveries", {"limit": limit})

    def replay_delivery(self, endpoint_id: str, delivery_id: str) -> dict[str, Any]:
        """Have a message sent again; returns the new delivery."""
        path = f"/v1/webhook-endpoints/{endpoint_id}/deliveries/{delivery_id}/replay"
        return self._call("POST", path)

    def rotate_webhook(
        self, endpoint_id: str, *, overlap_seconds: float | None = None
    ) -> dict[str, Any]:
        """Replace the secret of a webhook endpoint; returns it with the new one."""
        body = {} if overlap_seconds is None else {"overlap_seconds": overlap_seconds}
        return self._call("POST", f"/v1/webhook-endpoints/{endpoint_id}/rotate-secret", json=body)

    def delete_webhook(self, endpoint_id: str) -> None:
        """Forget a webhook endpoint and what waits for it."""
        self._send("DELETE", f"/v1/webhook-endpoints/{endpoint_id}")

    def wait(self, job_id: str) -> dict[str, Any]:
        """Wait until a job has ended, however it did; returns the job."""
        for _ in self.events(job_id):
            pass
        return self.job(job_id)

    def events(self, job_id: str, *, after: int = 0) -> Iterator[dict[str, Any]]:
        """Every event of a job from ``after`` on, live, without gaps, until it is finished.

        A job that was retried has an end for each attempt; the last one is meant.

        A lost connection is taken up again where it broke, for five minutes.
        """
        last, heard_at = after, time.monotonic()
        while True:
            try:
                for seq, event in self._stream(f"/v1/jobs/{job_id}/events", last or None):
                    last, heard_at = seq, time.monotonic()
                    if event is None:
                        continue
                    yield event
                    if event["type"] == "job.finished" and not self._goes_on(job_id, event):
                        return
                if self._is_over(job_id, last):
                    return
                heard_at = time.monotonic()
            except ApiError as error:
                _raise_if_final(error, heard_at)
            time.sleep(_RECONNECT_SECONDS)

    def all_events(
        self, *, after: int | None = None, **filters: str | Sequence[str]
    ) -> Iterator[dict[str, Any]]:
        """What happens to all jobs from now on, live, without gaps, and without an end.

        A lost connection is taken up again where it broke, for five minutes.

        Args:
            after: ``position`` of the last event seen: begin after it instead. Those of the last
                seven days are kept; further back is refused (``news_gone``).
            filters: ``type``, ``state``, ``method``, ``initiator``, ``label.<name>``.
        """
        last, heard_at = after, time.monotonic()
        while True:
            try:
                for position, event in self._stream("/v1/events", last, filters):
                    last, heard_at = position, time.monotonic()
                    if event is not None:
                        yield event
                heard_at = time.monotonic()
            except ApiError as error:
                _raise_if_final(error, heard_at)
            time.sleep(_RECONNECT_SECONDS)

    def _goes_on(self, job_id: str, end: dict[str, Any]) -> bool:
        """Whether the end of an attempt was followed by a retry."""
        attempt: int | None = end.get("attempt")
        return self.job(job_id).get("attempt", attempt) != attempt

    def _is_over(self, job_id: str, last: int) -> bool:
        """Whether a stream that ended said everything; a service that stops ends its streams."""
        if not self.job(job_id)["is_terminal"]:
            return False
        return not self._list(f"/v1/jobs/{job_id}/events", {"after": last})


def _raise_if_final(error: ApiError, heard_at: float) -> None:
    """Raise what ends a stream; nothing for what another try may mend, for a time."""
    is_lost = error.retryable or error.code == "unreachable"
    if not is_lost or time.monotonic() - heard_at > _PATIENCE_SECONDS:
        raise error
