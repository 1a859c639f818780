"""From what the store gives to what the API shows."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from service.api.objects import EventObject, JobDetail, JobObject, ShardObject, TokenObject
from service.jobs.records import (
    EventRecord,
    IntegrationState,
    JobIntegration,
    JobRecord,
    ShardRecord,
    TokenRecord,
)
from service.jobs.states import JobState
from service.problems import problem


def etag(job: JobRecord) -> str:
    """The entity tag of a job: changes with everything that can be seen of it."""
    return f'"{job.revision}"'


def job_object(job: JobRecord, url: str) -> JobObject:
    """A job as lists show it; ``url`` is its page."""
    return JobObject.model_validate(_job_members(job, url))


def job_detail(job: JobRecord, url: str) -> JobDetail:
    """A job in full."""
    return JobDetail.model_validate(_job_members(job, url))


def _job_members(job: JobRecord, url: str) -> dict[str, Any]:
    return {
        **members(job),
        "is_terminal": job.is_terminal,
        "phase": job.phase,
        "seed": job.options.get("seed", 0),
        "url": url,
        "integrations": [_integration(entry, job) for entry in job.integrations],
        "etag": etag(job),
    }


def _integration(entry: JobIntegration, job: JobRecord) -> dict[str, Any]:
    """Of a job that came to nothing there is nothing to tell, until it is retried."""
    shown = members(entry)
    if entry.error is not None:
        shown["error"] = problem(entry.error["code"], entry.error["detail"])
    came_to_nothing = job.state in (JobState.FAILED, JobState.CANCELLED)
    if came_to_nothing and entry.state == IntegrationState.PENDING:
        shown["state"] = "skipped"
    return shown


def shard_object(shard: ShardRecord) -> ShardObject:
    """A shard."""
    return ShardObject.model_validate(members(shard))


def event_object(event: EventRecord) -> EventObject:
    """An event; the same in streams and pages."""
    return EventObject.model_validate(members(event))


def token_object(token: TokenRecord) -> TokenObject:
    """A token."""
    return TokenObject.model_validate(members(token))


def members(record: msgspec.Struct) -> dict[str, Any]:
    """The fields of a record as plain values; times stay times."""
    found = msgspec.to_builtins(record, builtin_types=(datetime,))
    assert isinstance(found, dict)
    return found
