"""Stored plans, and the plan that a job is to run."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
JSON = sa.JSON(none_as_null=True)


def upgrade() -> None:
    op.create_table(
        "plans",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("expires_at", TIME, nullable=False),
        sa.Column("recipe_source", JSON, nullable=False),
        sa.Column("options", JSON, nullable=False),
        sa.Column("summary", JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_plans"),
    )
    op.create_index("ix_plans_expires_at", "plans", ["expires_at"])
    op.add_column("jobs", sa.Column("plan_id", sa.String(length=64)))
    op.add_column("jobs", sa.Column("pinned_plan_digest", sa.String(length=80)))
