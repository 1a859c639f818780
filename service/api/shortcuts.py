"""A short way to the answers that clients ask for all the time.

Finding a route and what it depends on takes the framework longer than such an answer takes to make.
Requests in their plainest form get the answer of the same function without; whatever else a request
says (a parameter, a form that it wants) is for the routes, which know about it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from service.api.deps import Services
from service.api.events import events_page
from service.api.jobs import JobQuery, count_jobs, list_jobs, read_job
from service.api.outcomes import list_shards
from service.auth import Scope
from service.paths import route_path

_PLAIN = (None, "*/*", "application/json")
"""What clients accept who take any form of an answer."""


class _Shortcut(NamedTuple):
    """What a request must be to fit; groups of the patterns go to ``answer``."""

    route: str
    path: re.Pattern[str]
    answer: Callable[..., Response]
    query: re.Pattern[str] = re.compile("")


def _list_jobs(services: Services, limit: str | None) -> Response:
    return list_jobs(JobQuery(limit=int(limit)) if limit else JobQuery(), services)


def _read_job(services: Services, job_id: str) -> Response:
    return read_job(job_id, services)


def _list_shards(services: Services, job_id: str) -> Response:
    return list_shards(job_id, services)


def _of_job(rest: str, answer: Callable[[Services, str], Response]) -> _Shortcut:
    pattern = re.compile(f"/v1/jobs/(job_[0-9a-z]{{26}}){rest}")
    return _Shortcut(f"/v1/jobs/{{job_id}}{rest}", pattern, answer)


_SHORTCUTS = (
    _of_job("", _read_job),
    _of_job("/events", events_page),
    _of_job("/shards", _list_shards),
    _Shortcut("/v1/jobs/counts", re.compile("/v1/jobs/counts"), count_jobs),
    _Shortcut(
        "/v1/jobs", re.compile("/v1/jobs"), _list_jobs, re.compile(r"(?:limit=([1-9]\d?|100))?")
    ),
)
"""All for tokens with the scope ``jobs:read``."""


class Shortcuts:
    """Answers by :data:`_SHORTCUTS` what they fit, and passes on everything else.

    Args:
        app: What to wrap: the routes.
        services: What the answers are made of.
    """

    def __init__(self, app: ASGIApp, *, services: Services) -> None:
        self._app = app
        self._services = services

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        answer = self._find(scope)
        if answer is None:
            await self._app(scope, receive, send)
            return
        scope["state"]["principal"].require(Scope.JOBS_READ)
        is_at_hand = self._services.store.is_at_hand
        response = answer() if is_at_hand else await run_in_threadpool(answer)
        await response(scope, receive, send)

    def _find(self, scope: AsgiScope) -> Callable[[], Response] | None:
        if scope["type"] != "http" or scope["method"] != "GET":
            return None
        path, query = route_path(scope), scope["query_string"].decode("latin-1")
        for shortcut in _SHORTCUTS:
            in_path, in_query = shortcut.path.fullmatch(path), shortcut.query.fullmatch(query)
            if in_path and in_query:
                break
        else:
            return None
        headers = Headers(scope=scope)
        if headers.get("accept") not in _PLAIN or "last-event-id" in headers:
            return None
        scope["state"]["route"] = shortcut.route
        found = (*in_path.groups(), *in_query.groups())
        return partial(shortcut.answer, self._services, *found)
