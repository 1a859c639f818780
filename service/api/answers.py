"""Answers whose bodies are made in one pass, from records to bytes.

What the framework makes of a declared model is validated first and then turned into JSON: for what
clients ask for all the time that is most of the work. These bodies have the models' members by
construction, and tests hold them to the models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import Response

from service.api.deps import Services
from service.api.views import etag, job_detail
from service.jobs.records import JobRecord


def json_answer(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer in JSON; records, times and states may stand anywhere in it."""
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def page_answer(
    data: list[Any],
    *,
    next_cursor: str | None = None,
    next_url: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A page of a list (:class:`service.api.objects.Page`)."""
    page = {"object": "list", "data": data, "next_cursor": next_cursor, "next_url": next_url}
    return json_answer(page, headers=headers)


def job_answer(
    services: Services,
    job: JobRecord,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A job in full (:class:`service.api.objects.JobDetail`), with its entity tag."""
    shown = job_detail(job, services.href(f"/jobs/{job.id}"))
    return json_answer(shown, status, {"ETag": etag(job), **(headers or {})})
