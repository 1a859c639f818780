"""Webhook endpoints, and the outbox of what is told to them."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
JSON = sa.JSON(none_as_null=True)


def upgrade() -> None:
    op.create_table(
        "webhook_endpoints",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("events", JSON, nullable=False),
        sa.Column("format", sa.String(length=16), nullable=False),
        sa.Column("initiator", sa.String(length=64)),
        sa.Column("is_enabled", sa.Boolean(), nullable=False),
        sa.Column("key_id", sa.String(length=16), nullable=False),
        sa.Column("secret_version", sa.Integer(), nullable=False),
        sa.Column("previous_key_id", sa.String(length=16)),
        sa.Column("previous_expires_at", TIME),
        sa.Column("paused_until", TIME),
        sa.Column("flagged_at", TIME),
        sa.Column("flag", sa.Text()),
        sa.CheckConstraint(
            "format IN ('standard', 'cloudevents')", name="ck_webhook_endpoints_format"
        ),
        sa.CheckConstraint(
            "(flagged_at IS NULL) = (flag IS NULL)", name="ck_webhook_endpoints_flag"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_webhook_endpoints"),
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("message_id", sa.String(length=64), nullable=False),
        sa.Column("endpoint_id", sa.String(length=64)),
        sa.Column("integration", sa.String(length=32)),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("data", JSON, nullable=False),
        sa.Column("occurred_at", TIME, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("due_at", TIME),
        sa.Column("last_attempt_at", TIME),
        sa.Column("response_status", sa.Integer()),
        sa.Column("response_body", sa.Text()),
        sa.Column("error", sa.Text()),
        sa.CheckConstraint("state IN ('pending', 'delivered', 'failed')", name="ck_outbox_state"),
        sa.CheckConstraint("(state = 'pending') = (due_at IS NOT NULL)", name="ck_outbox_due"),
        sa.CheckConstraint(
            "(endpoint_id IS NULL) <> (integration IS NULL)", name="ck_outbox_one_receiver"
        ),
        sa.ForeignKeyConstraint(
            ["endpoint_id"],
            ["webhook_endpoints.id"],
            name="fk_outbox_webhook_endpoints",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_outbox"),
    )
    op.create_index("ix_outbox_due_at", "outbox", ["due_at"])
    op.create_index(
        "ix_outbox_endpoint_id_created_at_id", "outbox", ["endpoint_id", "created_at", "id"]
    )
    op.create_index("ix_outbox_created_at", "outbox", ["created_at"])
