"""From what the store gives to what the API shows."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

import msgspec

from service.api.objects import JobDetail, JobObject, TokenObject
from service.jobs.records import (
    IntegrationState,
    JobIntegration,
    JobRecord,
    ShardRecord,
    TokenRecord,
)
from service.jobs.states import JobState
from service.problems import problem

_LISTED = tuple(JobObject.model_fields)
_DETAILED = tuple(JobDetail.model_fields)


def etag(job: JobRecord) -> str:
    """The entity tag of a job: changes with everything that can be seen of it."""
    return f'"{job.revision}"'


def job_object(job: JobRecord, url: str) -> dict[str, Any]:
    """A job as lists show it (:class:`service.api.objects.JobObject`); ``url`` is its page."""
    return _job_members(job, url, _LISTED)


def job_detail(job: JobRecord, url: str) -> dict[str, Any]:
    """A job in full (:class:`service.api.objects.JobDetail`)."""
    return _job_members(job, url, _DETAILED)


def _job_members(job: JobRecord, url: str, names: Iterable[str]) -> dict[str, Any]:
    made = {
        "object": "job",
        "is_terminal": job.is_terminal,
        "phase": job.phase,
        "seed": job.options.get("seed", 0),
        "url": url,
        "integrations": [_integration(entry, job) for entry in job.integrations],
        "etag": etag(job),
    }
    return {name: made[name] if name in made else getattr(job, name) for name in names}


def _integration(entry: JobIntegration, job: JobRecord) -> dict[str, Any]:
    """Of a job that came to nothing there is nothing to tell, until it is retried."""
    shown = members(entry)
    if entry.error is not None:
        shown["error"] = problem(entry.error["code"], entry.error["detail"])
    came_to_nothing = job.state in (JobState.FAILED, JobState.CANCELLED)
    if came_to_nothing and entry.state == IntegrationState.PENDING:
        shown["state"] = "skipped"
    return shown


def shard_object(shard: ShardRecord) -> dict[str, Any]:
    """A shard (:class:`service.api.objects.ShardObject`)."""
    return {"object": "shard", **msgspec.structs.asdict(shard)}


def token_object(token: TokenRecord) -> TokenObject:
    """A token."""
    return TokenObject.model_validate(members(token))


def members(record: msgspec.Struct) -> dict[str, Any]:
    """The fields of a record as plain values; times stay times."""
    found = msgspec.to_builtins(record, builtin_types=(datetime,))
    assert isinstance(found, dict)
    return found
