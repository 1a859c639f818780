"""News: everything that happened, whatever it happened to, in one order for all who follow it.

Events of jobs are told as their own streams tell them. Of what else changes (labels, tokens,
webhooks) the news only say that it did: who wants to know how reads it again.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Protocol

import msgspec

from service.jobs.states import JobState


class NewsType(StrEnum):
    """What is told besides the events of jobs (:class:`service.jobs.records.EventType`)."""

    JOB_UPDATED = "job.updated"  # labels or priority
    JOB_FORGOTTEN = "job.forgotten"
    TOKEN_CHANGED = "token.changed"  # noqa: S105 - a name, not a secret
    WEBHOOK_CHANGED = "webhook.changed"
    DELIVERIES_CHANGED = "webhook.deliveries_changed"


class NewsItem(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened. Its JSON is what the API shows (``service.api.objects``).

    Attributes:
        position: Place in the order; rises, with gaps.
        type: An event's type, or a :class:`NewsType`.
        subject: Id of what it happened to: a job, a token or a webhook endpoint.
        job_id: The same, if that is a job.
        seq: Number of the event among those of its job; None if it is no event of a job.
        attempt: Of the job, with an event.
        state: Of the job after the event.
        data: Of the event.
        labels: Of the job as they are now; empty if it is no job, or was forgotten.
        method: Likewise.
        methods: Likewise.
        initiator: Likewise.
    """

    position: int
    type: str
    time: datetime
    subject: str
    job_id: str | None
    seq: int | None
    attempt: int | None
    state: JobState | None
    data: dict[str, Any]
    labels: dict[str, str]
    method: str | None
    methods: tuple[str, ...]
    initiator: str | None


class NewsBounds(msgspec.Struct, frozen=True):
    """The news that can be told: those after ``first``, up to ``last``."""

    first: int
    last: int


class NewsStore(Protocol):
    """What is told of everything."""

    def news_bounds(self) -> NewsBounds:
        """Which news can be told now.

        No news will ever appear at or before ``last``: whoever has read up to there has read all.
        """

    def news(self, after: int, upto: int, limit: int = 1000) -> list[NewsItem]:
        """News with ``after < position <= upto`` in order; ``upto`` is the bounds' ``last``."""

    def prune_news(self, kept: timedelta) -> int:
        """Forget news that are older; how many. Events stay with their jobs."""
