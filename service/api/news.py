"""What happens to all jobs, tokens and webhooks: live as server-sent events, or as pages."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from time import monotonic
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.sse import format_sse_event
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from service.api.deps import PrincipalDep, Services, ServicesDep, guarded
from service.api.filters import WORD, LabelQuery
from service.api.objects import NewsObject, Page
from service.api.streams import EventStream, Position, retry_message
from service.api.views import members
from service.auth import Principal, Scope
from service.jobs.errors import StoreUnavailableError
from service.jobs.news import NewsItem, NewsType
from service.jobs.records import EventType
from service.jobs.states import JobState
from service.news import HEARTBEAT_SECONDS

router = APIRouter(prefix="/v1/events", tags=["events"])

_MOST_READ = 10_000
"""News that are looked at for one page, so that a filter that fits nothing ends soon too."""

_SCOPES = {
    NewsType.TOKEN_CHANGED: Scope.ADMIN,
    NewsType.WEBHOOK_CHANGED: Scope.WEBHOOKS_WRITE,
    NewsType.DELIVERIES_CHANGED: Scope.WEBHOOKS_WRITE,
}
"""What not everybody is told who may read jobs."""


class NewsQuery(LabelQuery):
    """Filters of the events. What else comes is ``label.<name>=<value>``, any number of times."""

    limit: int = Field(default=100, ge=1, le=1000, description="Of a page of JSON.")
    type: list[EventType | NewsType] = Field(
        default=[], max_length=len(EventType) + len(NewsType), description="Events of these types."
    )
    state: list[JobState] = Field(
        default=[], max_length=len(JobState), description="Events after which a job is so."
    )
    method: str | None = Field(default=None, pattern=WORD)
    initiator: str | None = Field(default=None, pattern=WORD)

    def test_for(self, principal: Principal) -> Callable[[NewsItem], bool]:
        """Whether an item is asked for, and may be told."""
        hidden = {kind for kind, scope in _SCOPES.items() if not principal.has(scope)}
        types, states, labels = set(self.type), set(self.state), self.labels.items()

        def fits(item: NewsItem) -> bool:
            return (
                item.type not in hidden
                and (not types or item.type in types)
                and (not states or item.state in states)
                and (self.method is None or self.method in item.methods)
                and self.initiator in (None, item.initiator)
                and labels <= item.labels.items()
            )

        return fits


@router.get(
    "",
    operation_id="events.all",
    response_model=Page[NewsObject],
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
    **guarded(Scope.JOBS_READ),
)
async def list_news(
    query: Annotated[NewsQuery, Query()],
    request: Request,
    services: ServicesDep,
    principal: PrincipalDep,
    position: Position,
) -> Response | Page[NewsObject]:
    """What happens to all jobs, in one order: a stream with ``Accept: text/event-stream``.

    The stream begins with what comes now, or after the position that it is resumed at, and does not
    end. Without that header it is a page, from the oldest event that is kept on. Changes of tokens
    and webhooks are told to those who may see them. 410: what came after the position is gone.
    """
    fits = query.test_for(principal)
    if "text/event-stream" not in request.headers.get("accept", ""):
        start = await services.news.place(position or 0)
        return await run_in_threadpool(_page, services, query, fits, start, request)
    start = await services.news.place(position)
    slot = services.streams.hold(principal.token_id)
    return EventStream(_stream(services, principal, fits, start), slot=slot)


def _page(
    services: Services,
    query: NewsQuery,
    fits: Callable[[NewsItem], bool],
    after: int,
    request: Request,
) -> Page[NewsObject]:
    upto = services.store.news_bounds().last
    data: list[NewsObject] = []
    num_read, batch = 0, 1000
    while after < upto and len(data) < query.limit and num_read < _MOST_READ:
        items = services.store.news(after, upto, batch)
        num_read += batch
        after = items[-1].position if len(items) == batch else upto
        for item in items:
            if fits(item):
                data.append(NewsObject.model_validate(members(item)))
                if len(data) == query.limit:
                    after = item.position
                    break
    if after >= upto:
        return Page(data=data)
    others = [
        (name, value) for name, value in request.query_params.multi_items() if name != "after"
    ]
    next_url = services.href(f"/v1/events?{urlencode([*others, ('after', after)])}")
    return Page(data=data, next_cursor=str(after), next_url=next_url)


async def _stream(
    services: Services, principal: Principal, fits: Callable[[NewsItem], bool], start: int
) -> AsyncGenerator[bytes]:
    yield retry_message(start)
    said_at = monotonic()
    try:
        async with aclosing(services.news.follow(start)) as pages:
            async for page, reached in pages:
                if any(news.item.subject == principal.token_id for news in page):
                    token = await run_in_threadpool(services.store.get_token, principal.token_id)
                    if token.revoked_at is not None:
                        return
                text = b"".join(news.sse for news in page if fits(news.item))
                if not text and monotonic() - said_at < HEARTBEAT_SECONDS:
                    continue
                # How far it is is said also where nothing fits: who resumes there skips nothing.
                yield text or format_sse_event(comment="still here", id=str(reached))
                said_at = monotonic()
    except StoreUnavailableError:  # too late for a problem; the client resumes
        yield format_sse_event(comment="the job store does not answer")
