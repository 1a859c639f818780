"""News: whoever follows them is told everything once, however many write."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from contextlib import aclosing
from datetime import timedelta

import pytest
import sqlalchemy as sa

from service.jobs.news import NewsBounds, NewsItem, NewsType
from service.jobs.outbox import AttemptOutcome, DeliveryState, NewEndpoint
from service.jobs.records import EventType, Progress
from service.jobs.sql_store import SqlJobStore, open_store
from service.jobs.states import JobState
from service.jobs.tell import news_row, tell
from service.news import News
from tests.contracts.test_job_store_concurrency import at_once
from tests.support.fake_clock import FakeClock
from tests.support.jobs import bring_to, new_job
from tests.support.postgres import PostgresServer


def everything(store: SqlJobStore, after: int = 0) -> list[NewsItem]:
    return store.news(after, store.news_bounds().last)


def kinds(store: SqlJobStore, after: int) -> list[tuple[str, str]]:
    return [(item.type, item.subject) for item in everything(store, after)]


def test_a_reader_that_follows_many_writers_is_told_every_event_once(store: SqlJobStore) -> None:
    """Transactions end in another order than they took their places in the order of all."""
    jobs = [bring_to(store, JobState.RUNNING) for _ in range(6)]
    start = store.news_bounds().last
    is_over = threading.Event()

    def write(number: int) -> None:
        _, claim = jobs[number]
        assert claim
        for turn in range(20):
            if turn % 3:
                store.update_progress(claim, Progress(bytes_done=turn))
            else:
                store.append_event(claim, EventType.JOB_WARNING, {"turn": turn})

    def follow(_: int) -> list[NewsItem]:
        seen: list[NewsItem] = []
        position = start
        while True:
            was_over = is_over.is_set()  # before it is read up to where
            upto = store.news_bounds().last
            while position < upto:
                page = store.news(position, upto, limit=7)
                seen += page
                position = page[-1].position if len(page) == 7 else upto
            if was_over:
                return seen

    def work(number: int) -> list[NewsItem]:
        if number >= len(jobs):
            return follow(number)
        try:
            write(number)
        finally:
            done.append(number)
            if len(done) == len(jobs):
                is_over.set()
        return []

    done: list[int] = []
    found = at_once(len(jobs) + 2, work)
    for seen in found[len(jobs) :]:
        assert [item.position for item in seen] == sorted({item.position for item in seen})
        told = [(item.subject, item.seq) for item in seen]
        assert Counter(told) == Counter(
            (job.id, event.seq)
            for job, _ in jobs
            for event in store.events(job.id, after=job.event_seq)
        )
        for job, _ in jobs:  # in the order of each
            mine = [seq for subject, seq in told if subject == job.id]
            assert mine == sorted(mine)


@pytest.mark.postgres
def test_a_transaction_that_ends_late_holds_back_what_came_after_it(
    postgres_server: PostgresServer,
) -> None:
    store = open_store(postgres_server.empty_database())
    bounds = store.news_bounds()
    assert bounds == NewsBounds(0, 0)
    with store._engine.connect() as late, store._engine.connect() as other:
        now = store._now(other)
        tell(late, [news_row("job.updated", now, "job_late")])
        tell(other, [news_row("job.updated", now, "job_early")])
        other.commit()
        assert store.news_bounds() == bounds  # the later number is there, the earlier is not yet
        late.commit()
    assert [item.subject for item in everything(store)] == ["job_late", "job_early"]
    with store._engine.connect() as broken:
        tell(broken, [news_row("job.updated", now, "job_never")])
        broken.rollback()  # leaves a gap that nobody waits for
    tell_one(store, "job_next")
    assert [item.subject for item in everything(store, 2)] == ["job_next"]
    store.close()


def tell_one(store: SqlJobStore, subject: str) -> None:
    with store._engine.begin() as connection:
        tell(connection, [news_row("job.updated", store._now(connection), subject)])


def test_an_event_is_told_as_its_job_tells_it(store: SqlJobStore) -> None:
    start = store.news_bounds().last
    job, claim = bring_to(store, JobState.RUNNING, labels={"team": "vision"}, initiator="tok_1")
    assert claim
    store.append_event(claim, EventType.JOB_WARNING, {"code": "x", "detail": "y"})
    told = everything(store, start)
    assert [(i.seq, i.type, i.time, i.job_id, i.attempt, i.data) for i in told] == [
        (e.seq, e.type, e.time, e.job_id, e.attempt, e.data) for e in store.events(job.id)
    ]
    assert [i.state for i in told] == ["queued", "planning", "running", "running"]
    assert {(i.method, i.initiator, i.labels["team"]) for i in told} == {
        ("linear", "tok_1", "vision")
    }


def test_changes_that_are_no_events_are_told_too(store: SqlJobStore) -> None:
    job, _ = bring_to(store, JobState.FAILED)
    token, _ = store.create_token("reader", ["jobs:read"])
    at = store.news_bounds().last
    store.patch(job.id, labels={"kept": "no"})
    store.touch_token(token.id)
    store.touch_token(token.id)  # within the minute: nothing changes
    store.revoke_token(token.id)
    store.delete(job.id)
    assert kinds(store, at) == [
        (NewsType.JOB_UPDATED, job.id),
        (NewsType.TOKEN_CHANGED, token.id),
        (NewsType.TOKEN_CHANGED, token.id),
        (NewsType.JOB_FORGOTTEN, job.id),
    ]


def test_webhooks_and_their_deliveries_are_told_of(store: SqlJobStore) -> None:
    start = store.news_bounds().last
    endpoint = store.create_endpoint(
        NewEndpoint(
            url="https://example.org/",
            description="",
            events=(),
            format="standard",
            key_id="k",
            initiator=None,
        )
    )
    store.test_endpoint(endpoint.id)
    taken = store.take_delivery(60)
    assert taken
    outcome = AttemptOutcome(state=DeliveryState.DELIVERED, response_status=200)
    assert store.finish_attempt(taken.delivery, outcome)
    store.delete_endpoint(endpoint.id)
    webhook, deliveries = NewsType.WEBHOOK_CHANGED, NewsType.DELIVERIES_CHANGED
    told = [webhook, deliveries, deliveries, deliveries, webhook, webhook]
    assert kinds(store, start) == [(kind, endpoint.id) for kind in told]


def test_of_a_forgotten_job_only_that_is_left(store: SqlJobStore) -> None:
    start = store.news_bounds().last
    job, _ = bring_to(store, JobState.SUCCEEDED)
    store.delete(job.id)
    assert kinds(store, start) == [(NewsType.JOB_FORGOTTEN, job.id)]


def test_old_news_go_and_their_places_are_not_given_again(
    store: SqlJobStore, clock: FakeClock
) -> None:
    store.submit(new_job())
    before = store.news_bounds()
    clock.advance(1000)
    assert store.prune_news(timedelta(seconds=999)) == 0  # the last are kept, to count on from
    store.submit(new_job())
    assert store.prune_news(timedelta(seconds=999)) >= 1
    after = store.news_bounds()
    assert after == NewsBounds(before.last, before.last + 1)
    with store._engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM news"))
    assert store.news_bounds() == NewsBounds(after.last, after.last)
    store.submit(new_job())
    assert store.news_bounds() == NewsBounds(after.last, after.last + 1)


def test_who_follows_one_replica_is_told_what_all_of_them_write(
    store: SqlJobStore, clock: FakeClock
) -> None:
    url = store._engine.url.render_as_string(hide_password=False)
    others = [open_store(url, clock=clock, migrate=False) for _ in range(3)]
    start = store.news_bounds().last
    written: list[str] = []

    async def follow() -> list[str]:
        news = News(store, poll_seconds=0.01)
        seen: list[str] = []
        async with aclosing(news.follow(start)) as pages:
            work = asyncio.gather(*(asyncio.to_thread(write, other) for other in others))
            async for page, _ in pages:
                seen += [shared.item.subject for shared in page]
                if len(seen) >= 60:
                    break
            await work
        return seen

    def write(other: SqlJobStore) -> None:
        written.extend(other.submit(new_job())[0].id for _ in range(20))

    assert Counter(asyncio.run(follow())) == Counter(written)
    for other in others:
        other.close()
