"""API tokens in the job store."""

from __future__ import annotations

import time
import zlib
from datetime import timedelta

import pytest
import sqlalchemy as sa

from service.jobs import sql_tokens
from service.jobs.errors import NotFoundError
from service.jobs.sql_store import SqlJobStore
from service.jobs.tables import tokens
from tests.support.fake_clock import FakeClock


def test_a_token_is_found_by_its_secret_only(store: SqlJobStore) -> None:
    token, secret = store.create_token("ci", ["jobs:read", "jobs:write"])
    assert store.find_token(secret) == token
    assert store.find_token(secret + "0") is None
    assert store.find_token("") is None
    assert (token.scopes, token.name) == (("jobs:read", "jobs:write"), "ci")


def test_secrets_can_be_recognised_and_checked_by_scanners(store: SqlJobStore) -> None:
    token, secret = store.create_token("ci", [])
    chance, check = secret.removeprefix("mergeyard_")[:-8], secret[-8:]
    assert int(check, 16) == zlib.crc32(chance.encode())
    assert len(chance) >= 40
    assert secret.startswith(token.prefix)
    assert len(token.prefix) < 20


def test_no_secret_is_stored(store: SqlJobStore) -> None:
    _, secret = store.create_token("ci", [])
    with store._engine.connect() as connection:
        (row,) = connection.execute(sa.select(tokens)).all()
    assert secret[20:] not in str(row)


def test_an_expired_token_is_not_found(store: SqlJobStore, clock: FakeClock) -> None:
    _, secret = store.create_token("ci", [], expires_at=clock() + timedelta(seconds=10))
    assert store.find_token(secret)
    clock.advance(10)
    assert store.find_token(secret) is None


def test_a_revoked_token_is_not_found_and_keeps_its_time(
    store: SqlJobStore, clock: FakeClock
) -> None:
    token, secret = store.create_token("ci", [])
    first = store.revoke_token(token.id)
    clock.advance(5)
    assert store.revoke_token(token.id) == first
    assert store.find_token(secret) is None
    with pytest.raises(NotFoundError, match="tok_none"):
        store.revoke_token("tok_none")


def test_use_is_noted_at_most_once_a_minute(store: SqlJobStore, clock: FakeClock) -> None:
    token, secret = store.create_token("ci", [])
    used = []
    for _ in range(3):
        clock.advance(40)
        store.touch_token(token.id)
        found = store.find_token(secret)
        assert found
        used.append(found.last_used_at)
    assert used[0] == used[1]
    assert used[2] == clock()


def test_a_configured_secret_is_one_token_however_often_it_is_imported(store: SqlJobStore) -> None:
    first = store.import_token("operator", ["admin"], "chosen by the operator, long enough")
    again = store.import_token("operator", ["admin"], "chosen by the operator, long enough")
    assert again == first
    assert first.prefix == ""  # no part of a chosen secret is shown
    assert store.find_token("chosen by the operator, long enough") == first
    assert store.list_tokens() == [first]


def test_a_token_that_another_replica_revoked_is_refused_within_a_second(
    store: SqlJobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, secret = store.create_token("ci", ["jobs:read"])
    other = SqlJobStore(store._engine)
    assert other.find_token(secret) == token
    store.revoke_token(token.id)
    assert store.find_token(secret) is None
    now = time.monotonic()
    monkeypatch.setattr(sql_tokens.time, "monotonic", lambda: now + 1.0)
    assert other.find_token(secret) is None
