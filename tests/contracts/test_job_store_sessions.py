"""Sessions and one-time codes in the job store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import sqlalchemy as sa

from service.jobs.sql_store import SqlJobStore
from service.jobs.tables import login_codes, sessions
from tests.support.fake_clock import FakeClock

HOUR = timedelta(hours=1)


def test_a_session_is_found_by_its_secret_with_its_token(store: SqlJobStore) -> None:
    token, _ = store.create_token("ci", ["jobs:read"])
    other, _ = store.create_token("other", ["admin"])
    session, secret = store.create_session(token.id, HOUR)
    store.create_session(other.id, HOUR)
    assert store.find_session(secret) == (session, token)
    assert store.find_session(secret + "x") is None
    assert store.find_session("") is None


@pytest.mark.parametrize("how", ["logout", "time", "revocation", "token expiry"])
def test_a_session_ends(store: SqlJobStore, clock: FakeClock, how: str) -> None:
    token, _ = store.create_token("ci", [], expires_at=clock() + timedelta(minutes=30))
    session, secret = store.create_session(token.id, timedelta(minutes=20))
    _, long_secret = store.create_session(token.id, HOUR)
    assert store.find_session(secret)
    if how == "logout":
        for _ in range(2):
            store.end_session(session.id)
    elif how == "revocation":
        store.revoke_token(token.id)
    else:
        clock.advance(20 * 60 if how == "time" else 30 * 60)
    assert store.find_session(secret) is None
    assert bool(store.find_session(long_secret)) == (how in ("logout", "time"))


def test_a_code_is_good_once_and_for_a_short_time(store: SqlJobStore, clock: FakeClock) -> None:
    token, _ = store.create_token("admin", ["admin"])
    code = store.create_login_code(token.id, timedelta(seconds=90))
    late = store.create_login_code(token.id, timedelta(seconds=30))
    clock.advance(31)
    assert store.redeem_login_code(late) is None
    assert store.redeem_login_code("nonsense") is None
    assert store.redeem_login_code(code) == token.id
    assert store.redeem_login_code(code) is None


def test_of_many_that_redeem_a_code_at_once_one_succeeds(store: SqlJobStore) -> None:
    token, _ = store.create_token("admin", ["admin"])
    code = store.create_login_code(token.id, HOUR)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(store.redeem_login_code, [code] * 16))
    assert sorted(filter(None, found)) == [token.id]


def test_secrets_are_not_stored_and_what_expired_is_forgotten(
    store: SqlJobStore, clock: FakeClock
) -> None:
    token, _ = store.create_token("ci", [])
    for _ in range(3):
        _, secret = store.create_session(token.id, HOUR)
        code = store.create_login_code(token.id, HOUR)
        clock.advance(3600)
    with store._engine.connect() as connection:
        rows = [connection.execute(sa.select(table)).all() for table in (sessions, login_codes)]
    assert [len(found) for found in rows] == [1, 1]
    assert secret not in str(rows)
    assert code not in str(rows)
