"""The tables, with everything that the database itself can hold true.

A change here needs a migration; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

from service.jobs.outbox import DeliveryState
from service.jobs.states import TERMINAL, TRANSITIONS, JobState, ShardState

ACTIVE = (JobState.PLANNING, JobState.RUNNING, JobState.PUBLISHING, JobState.CANCELLING)
"""States in which a job may be writing its output."""


class UtcDateTime(TypeDecorator[datetime]):
    """Aware datetimes in UTC, also where the database (SQLite) knows no time zones."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        """To UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        """From UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _one_of(column: str, values: Iterable[str]) -> str:
    return f"{column} IN ({', '.join(repr(str(value)) for value in values)})"


def _transition_check() -> str:
    """Only the transitions of ``states.py``; a new job begins as queued."""
    steps = [(str(old), str(new)) for old, allowed in TRANSITIONS.items() for new in allowed]
    pairs = [f"{old}>{new}" for old, new in [("", str(JobState.QUEUED)), *sorted(steps)]]
    return _one_of("coalesce(previous_state, '') || '>' || state", pairs)


_ended = _one_of("state", sorted(TERMINAL))
_json = sa.JSON(none_as_null=True)

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("type", sa.String(32), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    # Written as `previous_state = state` with every change of state, so that the check sees both.
    sa.Column("previous_state", sa.String(16)),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("event_seq", sa.Integer, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("queued_at", UtcDateTime, nullable=False),
    sa.Column("started_at", UtcDateTime),
    sa.Column("finished_at", UtcDateTime),
    sa.Column("estimated_finish_at", UtcDateTime),
    sa.Column("progress", _json, nullable=False),
    sa.Column("phases", _json, nullable=False),
    sa.Column("recipe_source", _json, nullable=False),
    sa.Column("recipe", _json, nullable=False),
    sa.Column("recipe_digest", sa.String(80), nullable=False),
    sa.Column("plan_digest", sa.String(80)),
    sa.Column("method", sa.String(64), nullable=False),
    sa.Column("methods", _json, nullable=False, server_default="[]"),
    sa.Column("output_uri", sa.Text, nullable=False),
    sa.Column("options", _json, nullable=False),
    sa.Column("inputs", _json, nullable=False),
    sa.Column("output", _json),
    sa.Column("error", _json),
    sa.Column("warnings", _json, nullable=False),
    sa.Column("labels", _json, nullable=False),
    sa.Column("metadata", _json, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("deadline_seconds", sa.Float),
    sa.Column("initiator", sa.String(64)),
    sa.Column("resubmitted_from", sa.String(64)),
    sa.Column("plan_id", sa.String(64)),
    sa.Column("pinned_plan_digest", sa.String(80)),
    sa.Column("traceparent", sa.String(64)),
    sa.Column("integrations", _json, nullable=False, server_default="[]"),
    sa.Column("lease_owner", sa.String(128)),
    sa.Column("lease_expires_at", UtcDateTime),
    sa.Column("fencing_token", sa.Integer, nullable=False),
    sa.Column("takeovers", sa.Integer, nullable=False),
    sa.Column("cancel_requested", sa.String(16)),
    sa.CheckConstraint(_one_of("state", JobState), name="state"),
    sa.CheckConstraint(_transition_check(), name="transition"),
    sa.CheckConstraint(f"({_ended}) = (finished_at IS NOT NULL)", name="finished"),
    sa.CheckConstraint("(state = 'failed') = (error IS NOT NULL)", name="error"),
    sa.CheckConstraint("(state = 'succeeded') = (output IS NOT NULL)", name="output"),
    sa.CheckConstraint("(lease_owner IS NULL) = (lease_expires_at IS NULL)", name="lease"),
    sa.CheckConstraint(
        f"lease_owner IS NULL OR {_one_of('state', ACTIVE)}", name="lease_only_active"
    ),
    sa.CheckConstraint("cancel_requested IN ('orderly', 'now')", name="cancel_requested"),
    sa.Index("ix_jobs_created_at_id", "created_at", "id"),
)
# Those of a state in the order in which the queue is served.
sa.Index("ix_jobs_queue", jobs.c.state, jobs.c.priority.desc(), jobs.c.queued_at, jobs.c.id)
# One job at a time writes to an output: a second one waits in the queue until it has ended.
sa.Index(
    "uq_jobs_active_output",
    jobs.c.output_uri,
    unique=True,
    sqlite_where=sa.text(_one_of("state", ACTIVE)),
    postgresql_where=sa.text(_one_of("state", ACTIVE)),
)


def _job_id() -> sa.Column[str]:
    reference = sa.ForeignKey("jobs.id", ondelete="CASCADE")
    return sa.Column("job_id", sa.String(64), reference, primary_key=True)


documents = sa.Table(
    "job_documents",
    metadata,
    _job_id(),
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("data", sa.LargeBinary, nullable=False),  # JSON, compressed with zlib
    sa.CheckConstraint("kind IN ('plan', 'report')", name="kind"),
)

shards = sa.Table(
    "shards",
    metadata,
    _job_id(),
    sa.Column("index", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("file_name", sa.Text, nullable=False),
    sa.Column("kind", sa.String(16), nullable=False, server_default="weights"),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("tensors_total", sa.Integer, nullable=False),
    sa.Column("tensors_fetched", sa.Integer, nullable=False),
    sa.Column("tensors_solved", sa.Integer, nullable=False),
    sa.Column("tensors_written", sa.Integer, nullable=False),
    sa.Column("bytes_read_total", sa.BigInteger, nullable=False),
    sa.Column("bytes_total", sa.BigInteger, nullable=False),
    sa.Column("started_at", UtcDateTime),
    sa.Column("finished_at", UtcDateTime),
    sa.Column("worker", sa.Text),
    sa.Column("device", sa.Text),
    sa.Column("receipt", _json),
    sa.Column("error", _json),
    sa.CheckConstraint(_one_of("state", ShardState), name="state"),
    sa.CheckConstraint("(state = 'succeeded') = (receipt IS NOT NULL)", name="receipt"),
)

events = sa.Table(
    "job_events",
    metadata,
    _job_id(),
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("type", sa.String(64), nullable=False),
    sa.Column("time", UtcDateTime, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("data", _json, nullable=False),
    sa.CheckConstraint("seq >= 1", name="seq"),
)

# What happened to anything, in the order of all readers (``service/jobs/tell.py``).
# No reference to the job: that it was forgotten is told too.
news = sa.Table(
    "news",
    metadata,
    sa.Column("position", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("type", sa.String(64), nullable=False),
    sa.Column("time", UtcDateTime, nullable=False),
    sa.Column("subject", sa.String(64), nullable=False),
    sa.Column("seq", sa.Integer),
    sa.Column("state", sa.String(16)),
    sqlite_autoincrement=True,  # the number of one that is gone is not given again
)

# What text search looks through: a narrow table, since every search reads it from end to end.
job_texts = sa.Table(
    "job_texts",
    metadata,
    _job_id(),
    sa.Column("text", sa.Text, nullable=False),
)

plans = sa.Table(
    "plans",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("expires_at", UtcDateTime, nullable=False, index=True),
    sa.Column("recipe_source", _json, nullable=False),
    sa.Column("options", _json, nullable=False),
    sa.Column("summary", _json, nullable=False),
)

# What an attempt may have left at its output, until that is removed: a failed or cancelled one its
# shards, a successful one at most uploads of workers that were lost.
# No reference to the job: it may be forgotten first.
leftovers = sa.Table(
    "leftovers",
    metadata,
    sa.Column("job_id", sa.String(64), primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("output_uri", sa.Text, nullable=False, index=True),
    sa.Column("plan", sa.LargeBinary, nullable=False),  # as in job_documents
    sa.Column("began_at", UtcDateTime, nullable=False),
    sa.Column("ended_at", UtcDateTime, nullable=False, index=True),
    # Until then somebody removes it, and no job with the same output may be claimed.
    sa.Column("collecting_until", UtcDateTime, index=True),
)

idempotency_keys = sa.Table(
    "idempotency_keys",
    metadata,
    sa.Column("owner", sa.String(64), primary_key=True),
    sa.Column("method", sa.String(16), primary_key=True),
    sa.Column("path", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("fingerprint", sa.String(80), nullable=False),
    # A job, plan, token or webhook endpoint.
    sa.Column("object_id", sa.String(64), nullable=False, index=True),
    sa.Column("created_at", UtcDateTime, nullable=False, index=True),
)

tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("prefix", sa.String(32), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False, unique=True),
    sa.Column("scopes", _json, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("expires_at", UtcDateTime),
    sa.Column("revoked_at", UtcDateTime),
    sa.Column("last_used_at", UtcDateTime),
)


def _token_id() -> sa.Column[str]:
    reference = sa.ForeignKey("tokens.id", ondelete="CASCADE")
    return sa.Column("token_id", sa.String(64), reference, nullable=False)


sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    _token_id(),
    sa.Column("hash", sa.String(64), nullable=False, unique=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("expires_at", UtcDateTime, nullable=False),
)

login_codes = sa.Table(
    "login_codes",
    metadata,
    sa.Column("hash", sa.String(64), primary_key=True),
    _token_id(),
    sa.Column("expires_at", UtcDateTime, nullable=False),
)

webhook_endpoints = sa.Table(
    "webhook_endpoints",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("events", _json, nullable=False),
    sa.Column("format", sa.String(16), nullable=False),
    sa.Column("initiator", sa.String(64)),
    sa.Column("is_enabled", sa.Boolean, nullable=False),
    # No secret is kept: it is derived from the service's key, this row's id and the version.
    sa.Column("key_id", sa.String(16), nullable=False),
    sa.Column("secret_version", sa.Integer, nullable=False),
    sa.Column("previous_key_id", sa.String(16)),
    sa.Column("previous_expires_at", UtcDateTime),
    sa.Column("paused_until", UtcDateTime),
    sa.Column("flagged_at", UtcDateTime),
    sa.Column("flag", sa.Text),
    sa.CheckConstraint("format IN ('standard', 'cloudevents')", name="format"),
    sa.CheckConstraint("(flagged_at IS NULL) = (flag IS NULL)", name="flag"),
)

outbox = sa.Table(
    "outbox",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("message_id", sa.String(64), nullable=False),
    sa.Column(
        "endpoint_id",
        sa.String(64),
        sa.ForeignKey("webhook_endpoints.id", ondelete="CASCADE"),
    ),
    sa.Column("integration", sa.String(32)),
    sa.Column("type", sa.String(64), nullable=False),
    sa.Column("data", _json, nullable=False),
    sa.Column("occurred_at", UtcDateTime, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("due_at", UtcDateTime),
    sa.Column("last_attempt_at", UtcDateTime),
    sa.Column("response_status", sa.Integer),
    sa.Column("response_body", sa.Text),
    sa.Column("error", sa.Text),
    sa.CheckConstraint(_one_of("state", DeliveryState), name="state"),
    sa.CheckConstraint("(state = 'pending') = (due_at IS NOT NULL)", name="due"),
    sa.CheckConstraint("(endpoint_id IS NULL) <> (integration IS NULL)", name="one_receiver"),
    sa.Index("ix_outbox_due_at", "due_at"),
    sa.Index("ix_outbox_endpoint_id_created_at_id", "endpoint_id", "created_at", "id"),
    sa.Index("ix_outbox_created_at", "created_at"),
)
