"""What attempts may have left at their outputs."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "leftovers",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("output_uri", sa.Text(), nullable=False),
        sa.Column("plan", sa.LargeBinary(), nullable=False),
        sa.Column("began_at", TIME, nullable=False),
        sa.Column("ended_at", TIME, nullable=False),
        sa.Column("collecting_until", TIME),
        sa.PrimaryKeyConstraint("job_id", "attempt", name="pk_leftovers"),
    )
    op.create_index("ix_leftovers_output_uri", "leftovers", ["output_uri"])
    op.create_index("ix_leftovers_ended_at", "leftovers", ["ended_at"])
