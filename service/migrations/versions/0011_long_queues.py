"""Indexes by which the next job is found however many wait and however many have been done."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("ix_jobs_state", "jobs")
    op.create_index("ix_jobs_queue", "jobs", ["state", sa.text("priority DESC"), "queued_at", "id"])
    op.create_index("ix_leftovers_collecting_until", "leftovers", ["collecting_until"])
