"""Sessions of browsers and one-time codes: like tokens, kept as a hash only."""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta

import sqlalchemy as sa

from service.jobs.ids import new_id
from service.jobs.records import SessionRecord, TokenRecord
from service.jobs.rows import to_record
from service.jobs.sql_base import SqlBase
from service.jobs.sql_tokens import hash_secret, is_usable
from service.jobs.tables import login_codes, sessions, tokens

_SECRET_BYTES = 32


class SessionStatements(SqlBase):
    """See :class:`service.jobs.store.SessionStore`."""

    def create_session(self, token_id: str, lifetime: timedelta) -> tuple[SessionRecord, str]:
        """See :meth:`service.jobs.store.SessionStore.create_session`."""
        secret, now = secrets.token_urlsafe(_SECRET_BYTES), self._clock()
        insert = sa.insert(sessions).values(
            id=new_id("ses", now),
            token_id=token_id,
            hash=hash_secret(secret),
            created_at=now,
            expires_at=now + lifetime,
        )
        with self._write() as connection:
            _sweep(connection, sessions, now)
            row = connection.execute(insert.returning(sessions)).one()
        return to_record(row, SessionRecord), secret

    def find_session(self, secret: str) -> tuple[SessionRecord, TokenRecord] | None:
        """See :meth:`service.jobs.store.SessionStore.find_session`."""
        now = self._clock()
        same = (sessions.c.hash == hash_secret(secret), sessions.c.expires_at > now)
        session = sa.select(sessions).where(*same)
        token = (
            sa.select(tokens)
            .join(sessions, sessions.c.token_id == tokens.c.id)
            .where(*same, is_usable(now))
        )
        with self._read() as connection:
            owner = connection.execute(token).one_or_none()
            row = connection.execute(session).one_or_none()
        if owner is None or row is None:
            return None
        return to_record(row, SessionRecord), to_record(owner, TokenRecord)

    def end_session(self, session_id: str) -> None:
        """See :meth:`service.jobs.store.SessionStore.end_session`."""
        with self._write() as connection:
            connection.execute(sa.delete(sessions).where(sessions.c.id == session_id))

    def create_login_code(self, token_id: str, lifetime: timedelta) -> str:
        """See :meth:`service.jobs.store.SessionStore.create_login_code`."""
        code, now = secrets.token_urlsafe(_SECRET_BYTES), self._clock()
        row = {"hash": hash_secret(code), "token_id": token_id, "expires_at": now + lifetime}
        with self._write() as connection:
            _sweep(connection, login_codes, now)
            connection.execute(sa.insert(login_codes).values(row))
        return code

    def redeem_login_code(self, code: str) -> str | None:
        """See :meth:`service.jobs.store.SessionStore.redeem_login_code`.

        One statement deletes and tells: of several replicas that are asked at once, one succeeds.
        """
        mine = login_codes.c.hash == hash_secret(code)
        taken = (
            sa.delete(login_codes)
            .where(mine)
            .returning(login_codes.c.token_id, login_codes.c.expires_at)
        )
        with self._write() as connection:
            row = connection.execute(taken).one_or_none()
        return None if row is None or row.expires_at <= self._clock() else str(row.token_id)


def _sweep(connection: sa.Connection, table: sa.Table, now: datetime) -> None:
    """Forget what has expired; cheap enough to go with every new row."""
    connection.execute(sa.delete(table).where(table.c.expires_at <= now))
