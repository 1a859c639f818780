"""Statements of webhook endpoints and their deliveries, for those who manage them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from service.jobs.announce import Message, pending_delivery
from service.jobs.errors import EndpointDisabledError, EndpointLimitError, NotFoundError
from service.jobs.ids import new_id
from service.jobs.news import NewsType
from service.jobs.outbox import (
    Announcement,
    DeliveryFilter,
    DeliveryRecord,
    EndpointRecord,
    NewEndpoint,
)
from service.jobs.records import IdempotencyRequest, JobCursor
from service.jobs.rows import to_json, to_record
from service.jobs.sql_keys import KeyStatements, forget_keys
from service.jobs.tables import UtcDateTime, outbox, webhook_endpoints

MOST_ENDPOINTS = 100


class EndpointStatements(KeyStatements):
    """See :class:`service.jobs.outbox.EndpointStore`."""

    def create_endpoint(
        self, endpoint: NewEndpoint, *, idempotency: IdempotencyRequest | None = None
    ) -> EndpointRecord:
        """See :meth:`service.jobs.outbox.EndpointStore.create_endpoint`."""
        values = {
            **to_json(endpoint),
            "is_enabled": True,
            "secret_version": 1,
        }
        count = sa.select(sa.func.count()).select_from(webhook_endpoints)
        with self._write() as connection:
            now = self._now(connection)
            values |= {"id": new_id("whe", now), "created_at": now}
            self._claim_key(connection, idempotency, values["id"])
            if connection.execute(count).scalar_one() >= MOST_ENDPOINTS:
                raise EndpointLimitError(
                    f"There are {MOST_ENDPOINTS} webhook endpoints already; delete one first."
                )
            insert = sa.insert(webhook_endpoints).values(values).returning(webhook_endpoints)
            made = to_record(connection.execute(insert).one(), EndpointRecord)
            self._tell(connection, NewsType.WEBHOOK_CHANGED, made.id)
            return made

    def list_endpoints(self) -> list[EndpointRecord]:
        """See :meth:`service.jobs.outbox.EndpointStore.list_endpoints`."""
        columns = webhook_endpoints.c
        query = sa.select(webhook_endpoints).order_by(columns.created_at.desc(), columns.id.desc())
        with self._read() as connection:
            return [to_record(row, EndpointRecord) for row in connection.execute(query)]

    def get_endpoint(self, endpoint_id: str) -> EndpointRecord:
        """See :meth:`service.jobs.outbox.EndpointStore.get_endpoint`."""
        with self._read() as connection:
            return _find(connection, endpoint_id)

    def update_endpoint(self, endpoint_id: str, changes: Mapping[str, Any]) -> EndpointRecord:
        """See :meth:`service.jobs.outbox.EndpointStore.update_endpoint`."""
        values = to_json(dict(changes))
        if values.get("is_enabled"):
            values |= {"flagged_at": None, "flag": None, "paused_until": None}
        with self._write() as connection:
            return self._update(connection, endpoint_id, values)

    def rotate_endpoint(self, endpoint_id: str, key_id: str, overlap: timedelta) -> EndpointRecord:
        """See :meth:`service.jobs.outbox.EndpointStore.rotate_endpoint`."""
        with self._write() as connection:
            values = {
                "previous_key_id": webhook_endpoints.c.key_id,
                "previous_expires_at": self._now(connection) + overlap,
                "key_id": key_id,
                "secret_version": webhook_endpoints.c.secret_version + 1,
            }
            return self._update(connection, endpoint_id, values)

    def delete_endpoint(self, endpoint_id: str) -> None:
        """See :meth:`service.jobs.outbox.EndpointStore.delete_endpoint`."""
        delete = sa.delete(webhook_endpoints).where(webhook_endpoints.c.id == endpoint_id)
        with self._write() as connection:
            if not connection.execute(delete).rowcount:
                raise _not_found(endpoint_id)
            forget_keys(connection, endpoint_id)
            self._tell(connection, NewsType.WEBHOOK_CHANGED, endpoint_id)

    def test_endpoint(self, endpoint_id: str) -> DeliveryRecord:
        """See :meth:`service.jobs.outbox.EndpointStore.test_endpoint`."""
        with self._write() as connection:
            now = self._now(connection)
            message = Message(new_id("evt", now), Announcement.ENDPOINT_TEST, {}, now)
            return self._send(connection, endpoint_id, message)

    def list_deliveries(
        self, delivery_filter: DeliveryFilter, *, cursor: JobCursor | None = None, limit: int = 20
    ) -> list[DeliveryRecord]:
        """See :meth:`service.jobs.outbox.EndpointStore.list_deliveries`."""
        query = (
            sa.select(outbox)
            .where(outbox.c.endpoint_id == delivery_filter.endpoint_id)
            .order_by(outbox.c.created_at.desc(), outbox.c.id.desc())
            .limit(limit)
        )
        if delivery_filter.state is not None:
            query = query.where(outbox.c.state == str(delivery_filter.state))
        if cursor is not None:
            seen = sa.tuple_(sa.literal(cursor.created_at, UtcDateTime), sa.literal(cursor.id))
            query = query.where(sa.tuple_(outbox.c.created_at, outbox.c.id) < seen)
        with self._read() as connection:
            _find(connection, delivery_filter.endpoint_id)
            return [to_record(row, DeliveryRecord) for row in connection.execute(query)]

    def get_delivery(self, endpoint_id: str, delivery_id: str) -> DeliveryRecord:
        """See :meth:`service.jobs.outbox.EndpointStore.get_delivery`."""
        query = sa.select(outbox).where(
            outbox.c.endpoint_id == endpoint_id, outbox.c.id == delivery_id
        )
        with self._read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFoundError(
                f"The endpoint {endpoint_id} has no delivery {delivery_id}.",
                context={"endpoint_id": endpoint_id, "delivery_id": delivery_id},
            )
        return to_record(row, DeliveryRecord)

    def replay_delivery(self, endpoint_id: str, delivery_id: str) -> DeliveryRecord:
        """See :meth:`service.jobs.outbox.EndpointStore.replay_delivery`."""
        old = self.get_delivery(endpoint_id, delivery_id)
        message = Message(old.message_id, old.type, old.data, old.occurred_at)
        with self._write() as connection:
            return self._send(connection, endpoint_id, message)

    def _send(
        self, connection: sa.Connection, endpoint_id: str, message: Message
    ) -> DeliveryRecord:
        if not _find(connection, endpoint_id, keep=True).is_enabled:
            raise EndpointDisabledError(
                f"The endpoint {endpoint_id} is disabled; enable it first.",
                context={"endpoint_id": endpoint_id},
            )
        row = pending_delivery(message, self._now(connection), endpoint_id=endpoint_id)
        made = connection.execute(sa.insert(outbox).values(row).returning(outbox)).one()
        self._tell(connection, NewsType.DELIVERIES_CHANGED, endpoint_id)
        return to_record(made, DeliveryRecord)

    def _update(
        self, connection: sa.Connection, endpoint_id: str, values: Mapping[str, Any]
    ) -> EndpointRecord:
        if not values:
            return _find(connection, endpoint_id)
        update = (
            sa.update(webhook_endpoints)
            .where(webhook_endpoints.c.id == endpoint_id)
            .values(values)
            .returning(webhook_endpoints)
        )
        row = connection.execute(update).one_or_none()
        if row is None:
            raise _not_found(endpoint_id)
        self._tell(connection, NewsType.WEBHOOK_CHANGED, endpoint_id)
        return to_record(row, EndpointRecord)


def _find(connection: sa.Connection, endpoint_id: str, *, keep: bool = False) -> EndpointRecord:
    """An endpoint; ``keep`` it from being deleted before the transaction ends."""
    query = sa.select(webhook_endpoints).where(webhook_endpoints.c.id == endpoint_id)
    if keep:
        query = query.with_for_update(read=True, key_share=True)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise _not_found(endpoint_id)
    return to_record(row, EndpointRecord)


def _not_found(endpoint_id: str) -> NotFoundError:
    return NotFoundError(
        f"There is no webhook endpoint {endpoint_id}.", context={"endpoint_id": endpoint_id}
    )
