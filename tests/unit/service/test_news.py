"""Following all news: everything once and in order, for the quick and for the slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from service import news as news_module
from service.jobs.errors import StoreUnavailableError
from service.jobs.news import NewsBounds, NewsItem
from service.news import News
from service.problems import RequestError

Body = Callable[["Store", News], Coroutine[Any, Any, None]]


class Store:
    """Stands in for the job store: news in a list, and a count of how often it was read."""

    def __init__(self) -> None:
        self.items: list[NewsItem] = []
        self.first = 0
        self.num_reads = 0
        self.fault: Exception | None = None

    def add(self, count: int) -> None:
        for _ in range(count):
            self.items.append(item(len(self.items) + 1))

    def news_bounds(self) -> NewsBounds:
        if self.fault is not None:
            raise self.fault
        return NewsBounds(self.first, len(self.items))

    def news(self, after: int, upto: int, limit: int = 1000) -> list[NewsItem]:
        self.num_reads += 1
        return [item for item in self.items if after < item.position <= upto][:limit]

    def prune_news(self, kept: timedelta) -> int:
        raise NotImplementedError


def item(position: int) -> NewsItem:
    return NewsItem(
        position=position,
        type="job.updated",
        time=datetime(2026, 1, 1, tzinfo=UTC),
        subject="job_1",
        job_id="job_1",
        seq=None,
        attempt=None,
        state=None,
        data={},
        labels={},
        method=None,
        methods=(),
        initiator=None,
    )


def with_news(body: Body) -> None:
    async def run() -> None:
        store = Store()
        await asyncio.wait_for(body(store, News(store, poll_seconds=0.001)), 30)

    asyncio.run(run())


async def positions(news: News, after: int, upto: int) -> list[int]:
    """Positions as they are told, until one is reached."""
    seen: list[int] = []
    async with aclosing(news.follow(after)) as pages:
        async for page, reached in pages:
            seen += [shared.item.position for shared in page]
            assert not page or seen[-1] <= reached
            if seen and seen[-1] >= upto:
                return seen
    return seen


async def readers_of(news: News, number: int) -> None:
    """Let tasks run until so many follow."""
    for _ in range(10_000):
        if news.num_readers >= number:
            return
        await asyncio.sleep(0.001)
    raise AssertionError(news.num_readers)


def test_whoever_comes_is_told_everything_after_its_place_once() -> None:
    async def body(store: Store, news: News) -> None:
        store.add(1700)
        readers = [asyncio.create_task(positions(news, after, 3000)) for after in (0, 900, 1700)]
        await readers_of(news, 3)
        for _ in range(13):
            store.add(100)
            await asyncio.sleep(0.002)
        found = await asyncio.gather(*readers)
        assert found == [list(range(after + 1, 3001)) for after in (0, 900, 1700)]
        assert news.num_readers == 0

    with_news(body)


def test_many_readers_ask_the_store_as_often_as_one() -> None:
    async def body(store: Store, news: News) -> None:
        readers = [asyncio.create_task(positions(news, 0, 40)) for _ in range(200)]
        await readers_of(news, 200)
        for _ in range(4):
            store.add(10)
            await asyncio.sleep(0.003)
        assert await asyncio.gather(*readers) == [list(range(1, 41))] * 200
        assert store.num_reads <= 4

    with_news(body)


def test_a_slow_reader_catches_up_from_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(news_module, "_MOST_KEPT", 10)

    async def slowly(news: News) -> AsyncIterator[int]:
        async with aclosing(news.follow(0)) as pages:
            async for page, _ in pages:
                for shared in page:
                    yield shared.item.position

    async def body(store: Store, news: News) -> None:
        slow = slowly(news)
        first = asyncio.ensure_future(anext(slow))
        await readers_of(news, 1)
        store.add(5)
        seen = [await first]
        store.add(2000)
        await positions(news, 1990, 2005)  # somebody else is told all of it meanwhile
        while seen[-1] < 2005:
            seen.append(await anext(slow))
        assert seen == list(range(1, 2006))
        await slow.aclose()

    with_news(body)


def test_a_store_that_is_away_for_a_while_loses_nothing() -> None:
    async def body(store: Store, news: News) -> None:
        reader = asyncio.create_task(positions(news, 0, 20))
        await readers_of(news, 1)
        store.add(10)
        store.fault = StoreUnavailableError("It is away.")
        store.add(10)
        await asyncio.sleep(0.02)
        store.fault = None
        assert await reader == list(range(1, 21))

    with_news(body)


def test_a_defect_and_the_end_of_the_server_end_the_streams() -> None:
    async def body(store: Store, news: News) -> None:
        reader = asyncio.create_task(positions(news, 0, 1))
        await readers_of(news, 1)
        store.fault = ZeroDivisionError()
        assert await reader == []
        store.fault = None
        reader = asyncio.create_task(positions(news, 0, 1))
        await readers_of(news, 1)
        news.close()
        assert await reader == []
        assert await positions(news, 0, 1) == []

    with_news(body)


def test_silence_says_how_far_the_news_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(news_module, "HEARTBEAT_SECONDS", 0.01)

    async def body(store: Store, news: News) -> None:
        store.add(7)
        async with aclosing(news.follow(7)) as pages:
            assert await anext(pages) == ((), 7)

    with_news(body)


def test_only_places_that_are_kept_can_be_resumed_at() -> None:
    async def body(store: Store, news: News) -> None:
        store.add(9)
        store.first = 4
        assert await news.place(None) == 9
        assert [await news.place(place) for place in (0, 4, 9)] == [0, 4, 9]
        for gone in (3, 10):
            with pytest.raises(RequestError, match="not kept") as raised:
                await news.place(gone)
            assert raised.value.code == "news_gone"

    with_news(body)
