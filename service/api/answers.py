"""Answers whose bodies are made in one pass, from records to bytes.

What the framework makes of a declared model is validated first and then turned into JSON: for what
clients ask for all the time that is most of the work. These bodies have the models' members by
construction, and tests hold them to the models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from fastapi import Response

from service.api.views import etag, job_detail, job_object
from service.jobs.records import JobHead, JobRecord
from service.jobs.store import JobQueue

_MOST_KEPT = 2000
_LONGEST_KEPT_BYTES = 16_384
"""Together a bound of memory: 32 MB; jobs of a few experts have 2 kB."""


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


class ShownJobs:
    """Jobs as lists show them, in JSON; kept, since most are as they were a moment ago.

    Args:
        store: Where the jobs are.
        href: Address of a path of this service as clients see it.
    """

    def __init__(self, store: JobQueue, href: Callable[[str], str]) -> None:
        self._store = store
        self._href = href
        self._kept: dict[str, tuple[int, msgspec.Raw]] = {}

    def show(self, heads: Sequence[JobHead]) -> list[msgspec.Raw]:
        """:class:`service.api.objects.JobObject` for each, but for those deleted by now."""
        kept = {head.id: self._kept.get(head.id) for head in heads}
        found = {
            head.id: shown[1]
            for head in heads
            if (shown := kept[head.id]) is not None and shown[0] >= head.revision
        }
        missing = [head.id for head in heads if head.id not in found]
        for job in self._store.get_many(missing).values() if missing else ():
            found[job.id] = _as_listed(job, self._href(f"/jobs/{job.id}"))
            self._keep(job, found[job.id])
        return [found[head.id] for head in heads if head.id in found]

    def _keep(self, job: JobRecord, shown: msgspec.Raw) -> None:
        if len(shown) > _LONGEST_KEPT_BYTES:
            return
        if len(self._kept) >= _MOST_KEPT:
            self._kept.clear()  # simplest, and as good: those in use are back with the next lists
        self._kept[job.id] = job.revision, shown


def _as_listed(job: JobRecord, url: str) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(job_object(job, url)))


def job_answer(
    job: JobRecord,
    href: Callable[[str], str],
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A job in full (:class:`service.api.objects.JobDetail`), with its entity tag."""
    shown = job_detail(job, href(f"/jobs/{job.id}"))
    return json_answer(shown, status, {"ETag": etag(job), **(headers or {})})
