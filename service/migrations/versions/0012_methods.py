"""All methods of a job: of a recipe of several documents, or of a sweep."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

_JOBS = sa.table(
    "jobs",
    sa.column("id"),
    sa.column("method"),
    *(sa.column(name, sa.JSON()) for name in ("recipe", "methods")),
)
_TEXTS = sa.table("job_texts", sa.column("job_id"), sa.column("text"))


def upgrade() -> None:
    methods = sa.Column("methods", sa.JSON(), nullable=False, server_default="[]")
    op.add_column("jobs", methods)
    database = op.get_bind()
    for row in database.execute(sa.select(_JOBS.c.id, _JOBS.c.method, _JOBS.c.recipe)).all():
        found = _methods(row.recipe, row.method)
        mine = _JOBS.c.id == row.id
        database.execute(sa.update(_JOBS).where(mine).values(methods=found))
        if len(found) > 1:
            text = _TEXTS.c.text + "\n" + "\n".join(found)
            database.execute(sa.update(_TEXTS).where(_TEXTS.c.job_id == row.id).values(text=text))


def _methods(recipe: dict[str, Any], method: str) -> list[str]:
    parts = recipe.get("documents") or recipe.get("sweep") or [recipe]
    return list(dict.fromkeys(part.get("merge_method") or method for part in parts))
