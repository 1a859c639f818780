"""What a shard's file is: weights of the output, or intermediate."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    kind = sa.Column("kind", sa.String(length=16), server_default="weights", nullable=False)
    op.add_column("shards", kind)


def downgrade() -> None:
    op.drop_column("shards", "kind")
