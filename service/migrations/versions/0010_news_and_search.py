"""News of everything in one order, and the text that jobs are found by."""

import sqlalchemy as sa
from alembic import op

from service.jobs.search import text_of

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

_FOUND_BY = ("id", "method", "output_uri", "inputs", "labels", "error")
_JOBS = sa.table(
    "jobs",
    *(sa.column(name) for name in ("id", "method", "output_uri")),
    *(sa.column(name, sa.JSON()) for name in ("inputs", "labels", "error")),
)


def upgrade() -> None:
    op.create_table(
        "news",
        sa.Column(
            "position",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("subject", sa.String(length=64), nullable=False),
        sa.Column("seq", sa.Integer()),
        sa.Column("state", sa.String(length=16)),
        sa.PrimaryKeyConstraint("position", name="pk_news"),
        sqlite_autoincrement=True,
    )
    texts = op.create_table(
        "job_texts",
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name="fk_job_texts_jobs", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", name="pk_job_texts"),
    )
    rows = op.get_bind().execute(sa.select(*(_JOBS.c[name] for name in _FOUND_BY))).mappings()
    found = [
        {"job_id": row["id"], "text": text_of(**row, methods=(method,))}
        for row in map(dict, rows)
        if (method := row.pop("method"))
    ]
    if found:
        op.bulk_insert(texts, found)
