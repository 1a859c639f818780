"""Writing announcements to the outbox, in the transaction of the change that they tell of."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import msgspec
import sqlalchemy as sa

from service.jobs.changes import Change
from service.jobs.ids import new_id
from service.jobs.news import NewsType
from service.jobs.outbox import Announcement, DeliveryState, announcement_of
from service.jobs.records import JobRecord
from service.jobs.tables import outbox, webhook_endpoints
from service.jobs.tell import news_row


class Message(msgspec.Struct, frozen=True):
    """An announcement, whoever gets it."""

    id: str
    type: Announcement
    data: dict[str, Any]
    occurred_at: datetime


def announce(
    connection: sa.Connection, job: JobRecord, changes: Sequence[Change], now: datetime
) -> list[dict[str, Any]]:
    """Queue what the last events of a job are to the outside, for all who want to know.

    Returns:
        The news of that (:func:`service.jobs.tell.news_row`): endpoints with new deliveries.
    """
    first = job.event_seq - len(changes) + 1
    messages = [
        _message(job, kind, seq, now)
        for seq, change in enumerate(changes, first)
        if (kind := announcement_of(*change)) is not None
    ]
    if not messages:
        return []
    rows = [
        pending_delivery(message, now, integration=integration.name)
        for message in messages
        for integration in job.integrations
    ]
    # Held until the transaction ends: an endpoint deleted in between would refuse the rows.
    subscribed = (
        sa.select(webhook_endpoints.c.id, webhook_endpoints.c.events)
        .where(webhook_endpoints.c.is_enabled)
        .order_by(webhook_endpoints.c.id)
        .with_for_update(read=True, key_share=True)
    )
    endpoints = connection.execute(subscribed).all()
    rows += [
        pending_delivery(message, now, endpoint_id=endpoint.id)
        for message in messages
        for endpoint in endpoints
        if message.type in endpoint.events
    ]
    if rows:
        connection.execute(sa.insert(outbox), rows)
    receivers = dict.fromkeys(row["endpoint_id"] for row in rows if row["endpoint_id"])
    return [news_row(NewsType.DELIVERIES_CHANGED, now, receiver) for receiver in receivers]


def pending_delivery(
    message: Message,
    now: datetime,
    *,
    endpoint_id: str | None = None,
    integration: str | None = None,
) -> dict[str, Any]:
    """The row of a message for one receiver, due at once."""
    return {
        "id": new_id("dlv", now),
        "message_id": message.id,
        "endpoint_id": endpoint_id,
        "integration": integration,
        "type": str(message.type),
        "data": message.data,
        "occurred_at": message.occurred_at,
        "created_at": now,
        "state": str(DeliveryState.PENDING),
        "attempts": 0,
        "due_at": now,
    }


def _message(job: JobRecord, kind: Announcement, seq: int, now: datetime) -> Message:
    data = {"job_id": job.id, "state": str(job.state), "attempt": job.attempt, "seq": seq}
    return Message(new_id("evt", now), kind, data, now)
