"""Writing the news, in the transaction of what they tell of."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from service.jobs.tables import news

_SEQUENCE = "news_position_seq"
_NUMBERED = f"SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END FROM {_SEQUENCE}"  # noqa: S608 - constants only

# Positions come from a sequence, and transactions end in another order than they drew them: who
# reads 7 may still be told 6. So each writer holds, until it has ended, a shared lock whose
# (negative) number says which positions had been drawn before its own; readers look at the locks
# and go no further than the lowest of them. Nobody waits for anybody.
_HOLD_BACK = sa.text(f"SELECT pg_advisory_xact_lock_shared(-1 - ({_NUMBERED}))")
_LOWEST_HELD = sa.text(
    "SELECT min(-1 - ((classid::bigint << 32) | objid::bigint)) FROM pg_locks"
    " WHERE locktype = 'advisory' AND objsubid = 1 AND classid::bigint >= 2147483648"
    " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


def tell(connection: sa.Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Append to the news; see :func:`news_row`."""
    if connection.dialect.name == "postgresql":
        connection.execute(_HOLD_BACK)
    connection.execute(sa.insert(news), rows)


def news_row(
    type_: str, time: datetime, subject: str, *, seq: int | None = None, state: str | None = None
) -> dict[str, Any]:
    """What happened to a job, token or webhook endpoint; ``seq`` and ``state`` with an event."""
    return {"type": type_, "time": time, "subject": subject, "seq": seq, "state": state}


def last_settled(connection: sa.Connection) -> int:
    """The position up to which the news are complete, whatever transactions are under way.

    Ends the transaction, so that what is read next sees everything up to there.
    """
    if connection.dialect.name != "postgresql":  # one writer at a time: what is there is complete
        last = sa.text("SELECT seq FROM sqlite_sequence WHERE name = 'news'")
        return connection.execute(last).scalar_one_or_none() or 0
    # In this order: a writer that is not seen holding its lock has ended, or draws later.
    drawn: int = connection.execute(sa.text(_NUMBERED)).scalar_one()
    lowest: int | None = connection.execute(_LOWEST_HELD).scalar_one()
    connection.commit()
    return drawn if lowest is None else min(drawn, lowest)
