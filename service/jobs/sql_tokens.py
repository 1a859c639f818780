"""API tokens: made here, kept as a hash."""

from __future__ import annotations

import hashlib
import secrets
import string
import time
import zlib
from collections.abc import Sequence
from datetime import datetime, timedelta

import sqlalchemy as sa

from service.jobs.errors import NotFoundError
from service.jobs.ids import new_id
from service.jobs.news import NewsType
from service.jobs.records import IdempotencyRequest, TokenRecord
from service.jobs.rows import to_record
from service.jobs.sql_base import Clock
from service.jobs.sql_keys import KeyStatements
from service.jobs.tables import sessions, tokens

SECRET_PREFIX = "mergeyard_"  # noqa: S105 - what scanners look for, not a secret
_DIGITS = string.digits + string.ascii_letters
_RANDOM_CHARACTERS = 40  # 238 bits
_SHOWN_CHARACTERS = len(SECRET_PREFIX) + 6
_SECONDS_KNOWN = 1.0
_MOST_KNOWN_TOKENS = 1000
_TOUCH_INTERVAL = timedelta(minutes=1)


def new_secret() -> str:
    """A secret that scanners can find and check: prefix, chance, CRC-32 of the chance."""
    chance = "".join(secrets.choice(_DIGITS) for _ in range(_RANDOM_CHARACTERS))
    return f"{SECRET_PREFIX}{chance}{zlib.crc32(chance.encode()):08x}"


class TokenStatements(KeyStatements):
    """See :class:`service.jobs.store.TokenStore`.

    Tokens are remembered for a second, since every request asks for one. One that another replica
    revoked is good for as long here.
    """

    def __init__(self, engine: sa.Engine, clock: Clock | None = None) -> None:
        super().__init__(engine, clock)
        self._known_tokens: dict[str, tuple[TokenRecord | None, float]] = {}

    def create_token(
        self,
        name: str,
        scopes: Sequence[str],
        *,
        expires_at: datetime | None = None,
        idempotency: IdempotencyRequest | None = None,
    ) -> tuple[TokenRecord, str]:
        """See :meth:`service.jobs.store.TokenStore.create_token`."""
        secret = new_secret()
        with self._write() as connection:
            token = self._insert(connection, name, scopes, secret, expires_at)
            self._claim_key(connection, idempotency, token.id)
            return token, secret

    def import_token(self, name: str, scopes: Sequence[str], secret: str) -> TokenRecord:
        """See :meth:`service.jobs.store.TokenStore.import_token`."""
        with self._write() as connection:
            known = sa.select(tokens).where(tokens.c.hash == hash_secret(secret))
            row = connection.execute(known).one_or_none()
            if row is not None:
                return to_record(row, TokenRecord)
            return self._insert(connection, name, scopes, secret, None)

    def _insert(
        self,
        connection: sa.Connection,
        name: str,
        scopes: Sequence[str],
        secret: str,
        expires_at: datetime | None,
    ) -> TokenRecord:
        now = self._clock()
        shown = secret[:_SHOWN_CHARACTERS] if secret.startswith(SECRET_PREFIX) else ""
        insert = sa.insert(tokens).values(
            id=new_id("tok", now),
            name=name,
            prefix=shown,
            hash=hash_secret(secret),
            scopes=list(scopes),
            created_at=now,
            expires_at=expires_at,
        )
        made = to_record(connection.execute(insert.returning(tokens)).one(), TokenRecord)
        self._tell(connection, NewsType.TOKEN_CHANGED, made.id)
        return made

    def find_token(self, secret: str) -> TokenRecord | None:
        """See :meth:`service.jobs.store.TokenStore.find_token`."""
        recalled = self.recall_token(secret)
        if recalled is not None:
            return recalled
        key, now = hash_secret(secret), self._clock()
        query = sa.select(tokens).where(tokens.c.hash == key, is_usable(now))
        with self._read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            return None
        token = to_record(row, TokenRecord)
        if len(self._known_tokens) >= _MOST_KNOWN_TOKENS:
            self._known_tokens.clear()
        self._known_tokens[key] = token, time.monotonic() + _SECONDS_KNOWN
        return token

    def recall_token(self, secret: str) -> TokenRecord | None:
        """See :meth:`service.jobs.store.TokenStore.recall_token`."""
        token, known_until = self._known_tokens.get(hash_secret(secret), (None, 0.0))
        if token is None or time.monotonic() >= known_until:
            return None
        return token if token.expires_at is None or self._clock() < token.expires_at else None

    def get_token(self, token_id: str) -> TokenRecord:
        """See :meth:`service.jobs.store.TokenStore.get_token`."""
        with self._read() as connection:
            row = connection.execute(sa.select(tokens).where(tokens.c.id == token_id)).one_or_none()
        if row is None:
            raise _not_found(token_id)
        return to_record(row, TokenRecord)

    def list_tokens(self) -> list[TokenRecord]:
        """See :meth:`service.jobs.store.TokenStore.list_tokens`."""
        query = sa.select(tokens).order_by(tokens.c.created_at.desc(), tokens.c.id.desc())
        with self._read() as connection:
            return [to_record(row, TokenRecord) for row in connection.execute(query)]

    def revoke_token(self, token_id: str) -> TokenRecord:
        """See :meth:`service.jobs.store.TokenStore.revoke_token`."""
        revoked_at = sa.func.coalesce(tokens.c.revoked_at, self._clock())
        update = sa.update(tokens).where(tokens.c.id == token_id).values(revoked_at=revoked_at)
        with self._write() as connection:
            row = connection.execute(update.returning(tokens)).one_or_none()
            connection.execute(sa.delete(sessions).where(sessions.c.token_id == token_id))
            if row is not None:
                self._tell(connection, NewsType.TOKEN_CHANGED, token_id)
        self._known_tokens.clear()
        if row is None:
            raise _not_found(token_id)
        return to_record(row, TokenRecord)

    def touch_token(self, token_id: str) -> None:
        """See :meth:`service.jobs.store.TokenStore.touch_token`."""
        now = self._clock()
        used_long_ago = sa.or_(
            tokens.c.last_used_at.is_(None), tokens.c.last_used_at < now - _TOUCH_INTERVAL
        )
        update = sa.update(tokens).where(tokens.c.id == token_id, used_long_ago)
        with self._write() as connection:
            if connection.execute(update.values(last_used_at=now)).rowcount:
                self._tell(connection, NewsType.TOKEN_CHANGED, token_id)
        self._known_tokens.clear()


def _not_found(token_id: str) -> NotFoundError:
    return NotFoundError(f"There is no token {token_id}.", context={"token_id": token_id})


def is_usable(now: datetime) -> sa.ColumnElement[bool]:
    """The token is neither revoked nor expired."""
    fresh = sa.or_(tokens.c.expires_at.is_(None), tokens.c.expires_at > now)
    return sa.and_(tokens.c.revoked_at.is_(None), fresh)


def hash_secret(secret: str) -> str:
    """SHA-256 suffices: secrets are long and random, so there is nothing to guess."""
    return hashlib.sha256(secret.encode()).hexdigest()
