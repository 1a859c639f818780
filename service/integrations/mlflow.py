"""MLflow's model registry: one version for each merge, by reference. No weights are sent.

The variants of a sweep are versions of one model.

Speaks MLflow's REST API 2.0 rather than through its client, which would bring thirty packages,
telemetry and waits of minutes for four requests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx
from pydantic import Field

from service.integrations.base import IntegrationError, IntegrationOptions, JobAnnouncement
from service.jobs.outbox import Announcement

_REQUEST_SECONDS = 10.0
_JOB_TAG = "mergeyard.job_id"
_VARIANT_TAG = "mergeyard.variant"
_NOT_IN_NAMES = re.compile(r"[^\w .-]+")
_LONGEST_NAME = 250


class MlflowOptions(IntegrationOptions):
    """What a job can say."""

    model_name: str | None = Field(
        default=None,
        min_length=1,
        max_length=_LONGEST_NAME,
        pattern=r"^[^/:\x00-\x1f\x7f]+$",
        description="The registered model; default: the last part of the output's address.",
    )


class Mlflow:
    """See :class:`service.integrations.base.Integration`.

    Args:
        url: Address of the tracking server.
        credentials: A bearer token, or ``user:password``.
        transport: For tests.
    """

    options: type[IntegrationOptions] = MlflowOptions

    def __init__(
        self, url: str, credentials: str = "", *, transport: httpx.BaseTransport | None = None
    ) -> None:
        self._url = url.rstrip("/")
        self._transport = transport
        self._headers: dict[str, str] = {}
        self._auth: tuple[str, str] | None = None
        user, colon, password = credentials.partition(":")
        if colon:
            self._auth = (user, password)
        elif credentials:
            self._headers = {"Authorization": f"Bearer {credentials}"}

    def on_event(self, event: JobAnnouncement) -> str | None:
        """Register what a job has merged; the address of the page of the (first) version."""
        if event.type != Announcement.JOB_SUCCEEDED:
            return None
        name = event.options.get("model_name") or _default_name(event.job.output_uri)
        with httpx.Client(
            base_url=self._url,
            headers=self._headers,
            auth=self._auth,
            timeout=_REQUEST_SECONDS,
            transport=self._transport,
        ) as http:
            first, *_ = [
                _find_version(http, name, event.job.id, output)
                or _create(http, name, event, output)
                for output in _outputs(event)
            ]
        return f"{self._url}/#/models/{quote(name)}/versions/{first}"


def _outputs(event: JobAnnouncement) -> list[dict[str, Any]]:
    """What the job has published: one checkpoint, or one for each variant, which has a name."""
    output = event.job.output or {}
    outputs: list[dict[str, Any]] = output.get("variants") or [output]
    return outputs


def _default_name(output_uri: str) -> str:
    last = output_uri.rstrip("/").rsplit("/", 1)[-1]
    return _NOT_IN_NAMES.sub("-", last)[:_LONGEST_NAME]


def _find_version(
    http: httpx.Client, name: str, job_id: str, output: Mapping[str, Any]
) -> str | None:
    """The version that an earlier try has made."""
    wanted = f"name = '{_quoted(name)}' AND tags.`{_JOB_TAG}` = '{job_id}'"
    if "name" in output:
        wanted += f" AND tags.`{_VARIANT_TAG}` = '{output['name']}'"
    found = _call(http, "GET", "model-versions/search", params={"filter": wanted})
    versions = found.get("model_versions") or []
    return str(versions[0]["version"]) if versions else None


def _quoted(text: str) -> str:
    return text.replace("'", "''")


def _create(
    http: httpx.Client, name: str, event: JobAnnouncement, output: Mapping[str, Any]
) -> str:
    _call(
        http,
        "POST",
        "registered-models/create",
        json={"name": name},
        but_not="RESOURCE_ALREADY_EXISTS",
    )
    job = event.job
    method = output.get("method", job.method)
    body = {
        "name": name,
        "source": output["uri"] if "name" in output else job.output_uri,
        "description": f"{method} of {_count_experts(job.inputs)} models, by Mergeyard.",
        "tags": [{"key": key, "value": value} for key, value in _tags(event, output).items()],
    }
    made = _call(http, "POST", "model-versions/create", json=body)
    return str(made["model_version"]["version"])


def _count_experts(inputs: tuple[dict[str, Any], ...]) -> int:
    return sum(item["role"] == "expert" for item in inputs)


def _tags(event: JobAnnouncement, output: Mapping[str, Any]) -> dict[str, str]:
    """Where the version comes from: enough to make it again, and to see whether it was changed."""
    job = event.job
    tags = {
        _JOB_TAG: job.id,
        "mergeyard.method": str(output.get("method", job.method)),
        "mergeyard.recipe_digest": job.recipe_digest,
        "mergeyard.plan_digest": job.plan_digest or "",
        "mergeyard.output_digest": str(output.get("digest", "")),
    }
    if "name" in output:
        tags[_VARIANT_TAG] = str(output["name"])
    for number, item in enumerate(job.inputs):
        tags[f"mergeyard.input.{number}"] = f"{item['role']} {item['uri']} {item['digest']}"
    return tags


def _call(
    http: httpx.Client, method: str, path: str, *, but_not: str | None = None, **arguments: Any
) -> Mapping[str, Any]:
    """One request; an error with the code ``but_not`` is none."""
    try:
        response = http.request(method, f"/api/2.0/mlflow/{path}", **arguments)
    except httpx.HTTPError as error:
        raise IntegrationError(
            f"MLflow does not answer ({type(error).__name__}).", retryable=True
        ) from error
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        body = {"message": "What answers is not MLflow."}
    elif response.is_success or (but_not is not None and body.get("error_code") == but_not):
        return body
    raise IntegrationError(
        f"MLflow answered {response.status_code} to {path}: {str(body.get('message'))[:500]}",
        retryable=response.status_code >= 500 or response.status_code in _WORTH_RETRYING,
    )


_WORTH_RETRYING = frozenset({401, 403, 404, 408, 429})
"""Somebody may put right what is wrong with credentials or address; 400 stays 400."""
