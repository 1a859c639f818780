"""Statements of those who deliver what the outbox holds."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import msgspec
import sqlalchemy as sa

from service.jobs.changes import Change
from service.jobs.errors import NotFoundError
from service.jobs.news import NewsType
from service.jobs.outbox import (
    AttemptOutcome,
    DeliveryRecord,
    DeliveryState,
    EndpointRecord,
    TakenDelivery,
)
from service.jobs.records import EventType, IntegrationState, JobRecord
from service.jobs.rows import to_json, to_record
from service.jobs.sql_base import SqlBase
from service.jobs.tables import outbox, webhook_endpoints

_OUTBOX_AND_ENDPOINTS = outbox.outerjoin(
    webhook_endpoints, outbox.c.endpoint_id == webhook_endpoints.c.id
)
_RECEIVER = sa.func.coalesce(outbox.c.endpoint_id, outbox.c.integration)


class OutboxStatements(SqlBase):
    """See :class:`service.jobs.outbox.Outbox`."""

    def take_delivery(
        self, lease_seconds: float, *, busy: Collection[str] = ()
    ) -> TakenDelivery | None:
        """See :meth:`service.jobs.outbox.Outbox.take_delivery`."""
        with self._write() as connection:
            now = self._now(connection)
            query = (
                sa.select(outbox.c.id)
                .select_from(_OUTBOX_AND_ENDPOINTS)
                .where(*_is_due(now), _RECEIVER.not_in(sorted(busy)))
                .order_by(outbox.c.due_at, outbox.c.id)
                .limit(1)
                .with_for_update(skip_locked=True, of=outbox)
            )
            lease = {
                "attempts": outbox.c.attempts + 1,
                "due_at": now + timedelta(seconds=lease_seconds),
                "last_attempt_at": now,
            }
            due = connection.execute(query).scalar_one_or_none()
            if due is None:
                return None
            update = sa.update(outbox).where(outbox.c.id == due).values(lease).returning(outbox)
            delivery = to_record(connection.execute(update).one(), DeliveryRecord)
            if delivery.endpoint_id is not None:
                self._tell(connection, NewsType.DELIVERIES_CHANGED, delivery.endpoint_id)
            endpoint = sa.select(webhook_endpoints).where(
                webhook_endpoints.c.id == delivery.endpoint_id
            )
            row = connection.execute(endpoint).one_or_none()
        return TakenDelivery(delivery, None if row is None else to_record(row, EndpointRecord))

    def finish_attempt(self, delivery: DeliveryRecord, outcome: AttemptOutcome) -> bool:
        """See :meth:`service.jobs.outbox.Outbox.finish_attempt`."""
        with self._write() as connection:
            now = self._now(connection)
            if delivery.endpoint_id is not None:
                # The endpoint is locked first, as when it is deleted: in the other order two
                # transactions could wait for each other. Announcements need not wait for it.
                lock = sa.select(webhook_endpoints.c.id).where(
                    webhook_endpoints.c.id == delivery.endpoint_id
                )
                connection.execute(lock.with_for_update(key_share=True))
            job = self._lock_job(connection, delivery)
            is_ours = _finish(connection, delivery, outcome, now)
            if is_ours and delivery.endpoint_id is not None:
                self._tell(connection, NewsType.DELIVERIES_CHANGED, delivery.endpoint_id)
                if _note_endpoint(connection, delivery.endpoint_id, outcome, now):
                    self._tell(connection, NewsType.WEBHOOK_CHANGED, delivery.endpoint_id)
            if is_ours and job is not None:
                self._note_integration(connection, job, delivery, outcome)
            return is_ours

    def _lock_job(self, connection: sa.Connection, delivery: DeliveryRecord) -> JobRecord | None:
        """The job that an integration is told of; None if it was forgotten meanwhile."""
        if delivery.integration is None:
            return None
        with suppress(NotFoundError):
            return self._lock(connection, delivery.data["job_id"])
        return None

    def _note_integration(
        self,
        connection: sa.Connection,
        job: JobRecord,
        delivery: DeliveryRecord,
        outcome: AttemptOutcome,
    ) -> None:
        if outcome.error is None and outcome.url is None:
            return
        state = IntegrationState.PENDING
        if outcome.state != DeliveryState.PENDING:
            has_made = outcome.url is not None
            state = IntegrationState.SUCCEEDED if has_made else IntegrationState.FAILED
        error = outcome.error and {"code": "integration_failed", "detail": outcome.error}
        facts = {"state": state, "url": outcome.url, "error": error}
        entries = [
            msgspec.structs.replace(entry, **facts) if entry.name == delivery.integration else entry
            for entry in job.integrations
        ]
        changes: list[Change] = []
        if state != IntegrationState.PENDING:
            changes.append(
                (EventType.INTEGRATION_FINISHED, {"name": delivery.integration, **facts})
            )
        self._change(connection, job.id, {"integrations": to_json(entries)}, changes)

    def longest_overdue(self) -> timedelta:
        """See :meth:`service.jobs.outbox.Outbox.longest_overdue`."""
        with self._read() as connection:
            now = self._now(connection)
            query = (
                sa.select(sa.func.min(outbox.c.due_at))
                .select_from(_OUTBOX_AND_ENDPOINTS)
                .where(*_is_due(now))
            )
            oldest: datetime | None = connection.execute(query).scalar_one()
        return timedelta(0) if oldest is None else now - oldest

    def prune_outbox(self, kept: timedelta) -> int:
        """See :meth:`service.jobs.outbox.Outbox.prune_outbox`."""
        with self._write() as connection:
            old = outbox.c.created_at < self._now(connection) - kept
            return connection.execute(sa.delete(outbox).where(old)).rowcount


def _finish(
    connection: sa.Connection, delivery: DeliveryRecord, outcome: AttemptOutcome, now: datetime
) -> bool:
    update = sa.update(outbox).where(
        outbox.c.id == delivery.id,
        outbox.c.attempts == delivery.attempts,
        outbox.c.state == str(DeliveryState.PENDING),
    )
    values = {
        "state": str(outcome.state),
        "due_at": None if outcome.retry_in is None else now + outcome.retry_in,
        "response_status": outcome.response_status,
        "response_body": outcome.response_body,
        "error": outcome.error,
    }
    return bool(connection.execute(update.values(values)).rowcount)


def _note_endpoint(
    connection: sa.Connection, endpoint_id: str, outcome: AttemptOutcome, now: datetime
) -> bool:
    """Note what a try says of its endpoint; whether that may have changed it."""
    values: dict[str, Any] = {}
    if outcome.state == DeliveryState.DELIVERED:
        values = {"paused_until": None, "flagged_at": None, "flag": None}
    if outcome.pause_for is not None:
        values["paused_until"] = now + outcome.pause_for
    if outcome.flag is not None:
        values |= {"flagged_at": now, "flag": outcome.flag}
    if outcome.disable:
        values["is_enabled"] = False
    if values:
        this = webhook_endpoints.c.id == endpoint_id
        connection.execute(sa.update(webhook_endpoints).where(this).values(values))
    return bool(values)


def _is_due(now: datetime) -> tuple[sa.ColumnElement[bool], ...]:
    """Waits for a sender, and its receiver may be called now."""
    endpoint = webhook_endpoints.c
    may_be_called = sa.and_(
        endpoint.is_enabled, sa.or_(endpoint.paused_until.is_(None), endpoint.paused_until <= now)
    )
    return (
        outbox.c.state == str(DeliveryState.PENDING),
        outbox.c.due_at <= now,
        sa.or_(outbox.c.endpoint_id.is_(None), may_be_called),
    )
