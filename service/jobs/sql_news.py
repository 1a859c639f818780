"""Statements about the news."""

from __future__ import annotations

from datetime import timedelta

import sqlalchemy as sa

from service.jobs.news import NewsBounds, NewsItem
from service.jobs.rows import to_record
from service.jobs.sql_base import SqlBase
from service.jobs.tables import events, jobs, news
from service.jobs.tell import last_settled

_EVENT = (events.c.job_id == news.c.subject) & (events.c.seq == news.c.seq)
_OF_JOB = news.c.subject.startswith("job_", autoescape=True)
_ITEM = (
    *(news.c[name] for name in ("position", "type", "time", "subject", "seq", "state")),
    sa.case((_OF_JOB, news.c.subject)).label("job_id"),
    events.c.attempt,
    sa.func.coalesce(events.c.data, sa.text("'{}'"), type_=sa.JSON()).label("data"),
    sa.func.coalesce(jobs.c.labels, sa.text("'{}'"), type_=sa.JSON()).label("labels"),
    jobs.c.method,
    sa.func.coalesce(jobs.c.methods, sa.text("'[]'"), type_=sa.JSON()).label("methods"),
    jobs.c.initiator,
)


class NewsStatements(SqlBase):
    """See :class:`service.jobs.news.NewsStore`."""

    def news_bounds(self) -> NewsBounds:
        """See :meth:`service.jobs.news.NewsStore.news_bounds`."""
        with self._read() as connection:
            last = last_settled(connection)
            oldest = connection.execute(sa.select(sa.func.min(news.c.position))).scalar_one()
        return NewsBounds(last if oldest is None else min(oldest - 1, last), last)

    def news(self, after: int, upto: int, limit: int = 1000) -> list[NewsItem]:
        """See :meth:`service.jobs.news.NewsStore.news`."""
        query = (
            sa.select(*_ITEM)
            .select_from(
                news.outerjoin(events, _EVENT).outerjoin(jobs, jobs.c.id == news.c.subject)
            )
            .where(
                news.c.position > after,
                news.c.position <= upto,
                # Events of a job that was forgotten went with it.
                news.c.seq.is_(None) | events.c.seq.is_not(None),
            )
            .order_by(news.c.position)
            .limit(limit)
        )
        with self._read() as connection:
            return [to_record(row, NewsItem) for row in connection.execute(query)]

    def prune_news(self, kept: timedelta) -> int:
        """See :meth:`service.jobs.news.NewsStore.prune_news`."""
        with self._write() as connection:
            kept_from = self._now(connection) - kept
            # The first to be kept is found along the primary key, past those that go.
            first = (
                sa.select(news.c.position)
                .where(news.c.time >= kept_from)
                .order_by(news.c.position)
                .limit(1)
            )
            old = sa.delete(news).where(news.c.position < first.scalar_subquery())
            return connection.execute(old).rowcount
