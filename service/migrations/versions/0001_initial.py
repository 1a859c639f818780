"""Jobs, shards, events, idempotency keys and tokens."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
JSON = sa.JSON(none_as_null=True)
ACTIVE = sa.text("state IN ('planning', 'running', 'publishing', 'cancelling')")


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("type", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("previous_state", sa.String(length=16)),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("event_seq", sa.Integer(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("queued_at", TIME, nullable=False),
        sa.Column("started_at", TIME),
        sa.Column("finished_at", TIME),
        sa.Column("estimated_finish_at", TIME),
        sa.Column("progress", JSON, nullable=False),
        sa.Column("phases", JSON, nullable=False),
        sa.Column("recipe_source", JSON, nullable=False),
        sa.Column("recipe", JSON, nullable=False),
        sa.Column("recipe_digest", sa.String(length=80), nullable=False),
        sa.Column("plan_digest", sa.String(length=80)),
        sa.Column("method", sa.String(length=64), nullable=False),
        sa.Column("output_uri", sa.Text(), nullable=False),
        sa.Column("options", JSON, nullable=False),
        sa.Column("inputs", JSON, nullable=False),
        sa.Column("output", JSON),
        sa.Column("error", JSON),
        sa.Column("warnings", JSON, nullable=False),
        sa.Column("labels", JSON, nullable=False),
        sa.Column("metadata", JSON, nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("deadline_seconds", sa.Float()),
        sa.Column("initiator", sa.String(length=64)),
        sa.Column("resubmitted_from", sa.String(length=64)),
        sa.Column("lease_owner", sa.String(length=128)),
        sa.Column("lease_expires_at", TIME),
        sa.Column("fencing_token", sa.Integer(), nullable=False),
        sa.Column("takeovers", sa.Integer(), nullable=False),
        sa.Column("cancel_requested", sa.String(length=16)),
        sa.CheckConstraint("(state = 'failed') = (error IS NOT NULL)", name="ck_jobs_error"),
        sa.CheckConstraint("(state = 'succeeded') = (output IS NOT NULL)", name="ck_jobs_output"),
        sa.CheckConstraint(
            "(state IN ('cancelled', 'failed', 'succeeded')) = (finished_at IS NOT NULL)",
            name="ck_jobs_finished",
        ),
        sa.CheckConstraint(
            "cancel_requested IN ('orderly', 'now')", name="ck_jobs_cancel_requested"
        ),
        sa.CheckConstraint(
            "coalesce(previous_state, '') || '>' || state IN ("
            "'>queued', 'cancelling>cancelled', 'cancelling>succeeded', "
            "'failed>queued', 'planning>cancelling', 'planning>failed', "
            "'planning>running', 'publishing>cancelling', 'publishing>failed', "
            "'publishing>succeeded', 'queued>cancelled', 'queued>planning', "
            "'running>cancelling', 'running>failed', 'running>publishing')",
            name="ck_jobs_transition",
        ),
        sa.CheckConstraint(
            "lease_owner IS NULL OR state IN ('planning', 'running', 'publishing', 'cancelling')",
            name="ck_jobs_lease_only_active",
        ),
        sa.CheckConstraint(
            "state IN ('queued', 'planning', 'running', 'publishing', 'succeeded', 'failed',"
            " 'cancelling', 'cancelled')",
            name="ck_jobs_state",
        ),
        sa.CheckConstraint(
            "(lease_owner IS NULL) = (lease_expires_at IS NULL)", name="ck_jobs_lease"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
    )
    op.create_index("ix_jobs_created_at_id", "jobs", ["created_at", "id"])
    op.create_index("ix_jobs_state", "jobs", ["state"])
    op.create_index(
        "uq_jobs_active_output",
        "jobs",
        ["output_uri"],
        unique=True,
        sqlite_where=ACTIVE,
        postgresql_where=ACTIVE,
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("prefix", sa.String(length=32), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("scopes", JSON, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("expires_at", TIME),
        sa.Column("revoked_at", TIME),
        sa.Column("last_used_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_tokens"),
        sa.UniqueConstraint("hash", name="uq_tokens_hash"),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("method", sa.String(length=16), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.String(length=80), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"],
            ["jobs.id"],
            name="fk_idempotency_keys_jobs",
            ondelete="CASCADE",
            initially="DEFERRED",
            deferrable=True,
        ),
        sa.PrimaryKeyConstraint("owner", "method", "path", "key", name="pk_idempotency_keys"),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])
    op.create_index("ix_idempotency_keys_job_id", "idempotency_keys", ["job_id"])
    op.create_table(
        "job_documents",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint("kind IN ('plan', 'report')", name="ck_job_documents_kind"),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name="fk_job_documents_jobs", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "kind", name="pk_job_documents"),
    )
    op.create_table(
        "job_events",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("time", TIME, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("data", JSON, nullable=False),
        sa.CheckConstraint("seq >= 1", name="ck_job_events_seq"),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name="fk_job_events_jobs", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "seq", name="pk_job_events"),
    )
    op.create_table(
        "shards",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("index", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("file_name", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("tensors_total", sa.Integer(), nullable=False),
        sa.Column("tensors_fetched", sa.Integer(), nullable=False),
        sa.Column("tensors_solved", sa.Integer(), nullable=False),
        sa.Column("tensors_written", sa.Integer(), nullable=False),
        sa.Column("bytes_read_total", sa.BigInteger(), nullable=False),
        sa.Column("bytes_total", sa.BigInteger(), nullable=False),
        sa.Column("started_at", TIME),
        sa.Column("finished_at", TIME),
        sa.Column("worker", sa.Text()),
        sa.Column("device", sa.Text()),
        sa.Column("receipt", JSON),
        sa.Column("error", JSON),
        sa.CheckConstraint(
            "(state = 'succeeded') = (receipt IS NOT NULL)", name="ck_shards_receipt"
        ),
        sa.CheckConstraint(
            "state IN ('pending', 'running', 'succeeded', 'failed')", name="ck_shards_state"
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_shards_jobs", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "index", name="pk_shards"),
    )
