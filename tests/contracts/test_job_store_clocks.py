"""Replicas whose machines disagree about the time share one PostgreSQL, and its clock."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from service.jobs import sql_base
from service.jobs.sql_store import SqlJobStore, open_store
from service.jobs.states import JobState
from tests.support.jobs import new_job
from tests.support.postgres import PostgresServer, postgres_server

__all__ = ["postgres_server"]
pytestmark = pytest.mark.postgres

STEPS = [timedelta(hours=2), timedelta(hours=-2)]


@pytest.fixture
def store(postgres_server: PostgresServer) -> Iterator[SqlJobStore]:
    """A store that takes the time from where it does by default."""
    made = open_store(postgres_server.empty_database())
    yield made
    made.close()


def set_clock(monkeypatch: pytest.MonkeyPatch, step: timedelta) -> None:
    """This machine's clock goes wrong, as far as stores opened from now on can tell."""
    monkeypatch.setattr(sql_base, "_machine_time", lambda: datetime.now(UTC) + step)


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_a_machine_whose_clock_is_wrong_takes_no_lease_that_holds(
    store: SqlJobStore, monkeypatch: pytest.MonkeyPatch, step: timedelta
) -> None:
    store.submit(new_job())
    claim = store.claim("runner-1", 60)
    assert claim is not None
    set_clock(monkeypatch, step)
    wrong = open_store(store._engine.url.render_as_string(hide_password=False))
    try:
        assert wrong.claim("runner-2", 60) is None
        assert store.renew(claim, 60).lease_owner == "runner-1"
    finally:
        wrong.close()


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_a_machine_whose_clock_is_wrong_keeps_no_lease_too_long_and_writes_true_times(
    store: SqlJobStore, monkeypatch: pytest.MonkeyPatch, step: timedelta
) -> None:
    begin = datetime.now(UTC)
    set_clock(monkeypatch, step)
    wrong = open_store(store._engine.url.render_as_string(hide_password=False))
    try:
        job, _ = wrong.submit(new_job(deadline_seconds=3600))
        assert store.claim("runner-2", 60, overdue=True) is None
        claim = wrong.claim("runner-1", 0.0)
        assert claim is not None
        wrong.transition(claim, JobState.RUNNING)
    finally:
        wrong.close()
    assert store.claim("runner-2", 60) is not None  # the first lease lapsed at once
    times = [event.time for event in store.events(job.id)]
    end = datetime.now(UTC)
    assert times == sorted(times)
    assert begin <= times[0] <= times[-1] <= end
    assert begin <= claim.claimed_at <= end
