"""Stored plans: what was asked, and what would happen.

Their problems are not kept: the same request gives the same plan, and its digest tells if not.
"""

from __future__ import annotations

from datetime import timedelta

import sqlalchemy as sa

from service.jobs.errors import NotFoundError
from service.jobs.ids import new_id
from service.jobs.records import IdempotencyRequest, NewPlan, PlanRecord
from service.jobs.rows import to_json, to_record
from service.jobs.sql_keys import KeyStatements
from service.jobs.tables import plans

PLAN_HOURS = 24
"""How long a plan can be run; published in the API's documentation."""


class PlanStatements(KeyStatements):
    """See :class:`service.jobs.store.PlanStore`."""

    def keep_plan(
        self, plan: NewPlan, *, idempotency: IdempotencyRequest | None = None
    ) -> PlanRecord:
        """See :meth:`service.jobs.store.PlanStore.keep_plan`."""
        now = self._clock()
        values = {
            **to_json(plan),
            "id": new_id("plan", now),
            "created_at": now,
            "expires_at": now + timedelta(hours=PLAN_HOURS),
        }
        with self._write() as connection:
            self._claim_key(connection, idempotency, values["id"])
            connection.execute(sa.delete(plans).where(plans.c.expires_at <= now))
            row = connection.execute(sa.insert(plans).values(values).returning(plans)).one()
        return to_record(row, PlanRecord)

    def find_plan(self, plan_id: str) -> PlanRecord:
        """See :meth:`service.jobs.store.PlanStore.find_plan`."""
        query = sa.select(plans).where(plans.c.id == plan_id, plans.c.expires_at > self._clock())
        with self._read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFoundError(
                f"There is no plan {plan_id}; plans are kept for {PLAN_HOURS} hours.",
                context={"plan_id": plan_id},
            )
        return to_record(row, PlanRecord)
