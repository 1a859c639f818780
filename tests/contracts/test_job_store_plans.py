"""Stored plans in the job store."""

from __future__ import annotations

from datetime import timedelta

import pytest
import sqlalchemy as sa

from service.jobs.errors import NotFoundError
from service.jobs.records import NewPlan
from service.jobs.sql_plans import PLAN_HOURS
from service.jobs.sql_store import SqlJobStore
from service.jobs.tables import plans
from tests.support.fake_clock import FakeClock
from tests.support.jobs import new_job

PLAN = NewPlan(
    recipe_source="merge_method: linear\n",
    options={"seed": 3},
    summary={"plan_digest": "sha256:1", "inputs": [{"uri": "/a", "digest": "x"}]},
)


def test_a_plan_is_kept_for_a_day(store: SqlJobStore, clock: FakeClock) -> None:
    kept = store.keep_plan(PLAN)
    assert kept.id.startswith("plan_")
    assert kept.expires_at - kept.created_at == timedelta(hours=PLAN_HOURS)
    assert (kept.recipe_source, kept.options, kept.summary) == (
        PLAN.recipe_source,
        PLAN.options,
        PLAN.summary,
    )
    clock.advance(PLAN_HOURS * 3600 - 1)
    assert store.find_plan(kept.id) == kept
    clock.advance(1)
    with pytest.raises(NotFoundError, match="24 hours"):
        store.find_plan(kept.id)


def test_plans_that_have_expired_are_forgotten(store: SqlJobStore, clock: FakeClock) -> None:
    for _ in range(3):
        newest = store.keep_plan(PLAN)
        clock.advance(PLAN_HOURS * 3600)
    with store._engine.connect() as connection:
        assert connection.execute(sa.select(plans.c.id)).scalars().all() == [newest.id]


def test_a_job_remembers_the_plan_that_it_is_to_run(store: SqlJobStore) -> None:
    job, _ = store.submit(new_job(plan_id="plan_1", pinned_plan_digest="sha256:1"))
    found = store.get(job.id)
    assert (found.plan_id, found.pinned_plan_digest) == ("plan_1", "sha256:1")
