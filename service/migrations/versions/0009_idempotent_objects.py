"""Idempotency keys of everything that can be made, not of jobs only."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


_TIME = sa.DateTime(timezone=True)
_OLD = sa.table(
    "idempotency_keys",
    *(sa.column(name) for name in ("owner", "method", "path", "key", "fingerprint", "job_id")),
    sa.column("created_at", _TIME),
)


def upgrade() -> None:
    rows = op.get_bind().execute(sa.select(_OLD)).mappings()
    kept = [
        {("object_id" if name == "job_id" else name): row[name] for name in row} for row in rows
    ]
    op.drop_table("idempotency_keys")
    new = op.create_table(
        "idempotency_keys",
        sa.Column("owner", sa.String(length=64), nullable=False),
        sa.Column("method", sa.String(length=16), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.String(length=80), nullable=False),
        sa.Column("object_id", sa.String(length=64), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("owner", "method", "path", "key", name="pk_idempotency_keys"),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])
    op.create_index("ix_idempotency_keys_object_id", "idempotency_keys", ["object_id"])
    if kept:
        op.bulk_insert(new, kept)
