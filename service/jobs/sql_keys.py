"""Idempotency keys: claimed in the transaction that makes what they stand for."""

from __future__ import annotations

from datetime import datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from service.jobs.errors import IdempotencyReusedError, RepeatedRequestError
from service.jobs.records import IdempotencyRequest
from service.jobs.rows import to_json
from service.jobs.sql_base import SqlBase
from service.jobs.tables import idempotency_keys

IDEMPOTENCY_HOURS = 24
"""How long a key is remembered; published in the API's documentation."""

_KEY_COLUMNS = ("owner", "method", "path", "key")


class KeyStatements(SqlBase):
    """For all statements that make something."""

    def find_created(self, idempotency: IdempotencyRequest) -> str | None:
        """See :meth:`service.jobs.store.KeyStore.find_created`."""
        with self._read() as connection:
            return _find_key(connection, idempotency, self._now(connection))

    def _claim_key(
        self, connection: sa.Connection, request: IdempotencyRequest | None, object_id: str
    ) -> None:
        """Take a key for what is being made; raise ``RepeatedRequestError`` if it is taken.

        The insert waits for another transaction that is just taking the same key, and then finds
        it taken: equal requests, however many at once, make one object.
        """
        if request is None:
            return
        now = self._now(connection)
        keys = idempotency_keys
        expired = keys.c.created_at < now - timedelta(hours=IDEMPOTENCY_HOURS)
        connection.execute(sa.delete(keys).where(expired))
        insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
        row = {**to_json(request), "object_id": object_id, "created_at": now}
        taken = insert(keys).values(row).on_conflict_do_nothing().returning(keys.c.object_id)
        if connection.execute(taken).one_or_none() is not None:
            return
        first = _find_key(connection, request, now)
        assert first is not None, "it was not taken because it is there"
        raise RepeatedRequestError(first)


def _find_key(connection: sa.Connection, request: IdempotencyRequest, now: datetime) -> str | None:
    keys = idempotency_keys
    same = (keys.c[name] == getattr(request, name) for name in _KEY_COLUMNS)
    fresh = keys.c.created_at >= now - timedelta(hours=IDEMPOTENCY_HOURS)
    query = sa.select(keys.c.object_id, keys.c.fingerprint).where(*same, fresh)
    found = connection.execute(query).one_or_none()
    if found is None:
        return None
    if found.fingerprint != request.fingerprint:
        raise IdempotencyReusedError(
            "This Idempotency-Key was used for another request. Use a new key, or send the"
            " first request again unchanged.",
            context={"object_id": found.object_id},
        )
    return str(found.object_id)


def forget_keys(connection: sa.Connection, object_id: str) -> None:
    """Let the keys of something that is deleted be used again."""
    keys = idempotency_keys
    connection.execute(sa.delete(keys).where(keys.c.object_id == object_id))
