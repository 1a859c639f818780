"""The application: routes, middleware and error handlers, wired to what it is given."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.gzip import DEFAULT_EXCLUDED_CONTENT_TYPES, GZipMiddleware

from merging.storage.base import Storage
from service.api import (
    events,
    health,
    job_actions,
    job_plan,
    jobs,
    logs,
    methods,
    news,
    outcomes,
    plans,
    recipes,
    sessions,
    tokens,
    webhook_endpoints,
    workers,
)
from service.api.answers import ShownJobs
from service.api.deps import SECURITY_SCHEMES, ReadinessCheck, Services
from service.api.errors import install_error_handlers
from service.api.objects import Problem
from service.api.shortcuts import Shortcuts
from service.auth import Authenticator
from service.dashboard.files import Dashboard
from service.feed import POLL_SECONDS, EventFeed
from service.forecast import Forecast
from service.integrations.catalogue import make_integrations
from service.jobs.store import JobStore
from service.limits import FailedLogins, RateLimit, StreamSlots
from service.metrics import Metrics
from service.middleware import Authentication, BodyRules, RequestContext
from service.news import News
from service.problems import PROBLEM_JSON
from service.settings import Settings
from service.tracing import TracedRequests
from service.webhooks.address_guard import AddressGuard
from service.webhooks.secrets import SecretKeys
from workers.tracing import Tracing

_COMPRESS_FROM_BYTES = 1024
_COMPRESS_LEVEL = 2  # a third of the time that 4 takes, for a few per cent
_NOT_COMPRESSED = (*DEFAULT_EXCLUDED_CONTENT_TYPES, "text/plain")
"""Logs are followed while they grow; compression would hold them back."""

_ROUTERS = (
    health,
    methods,
    recipes,
    plans,
    jobs,
    job_actions,
    job_plan,
    outcomes,
    events,
    news,
    logs,
    tokens,
    sessions,
    webhook_endpoints,
    workers,
)


def utc_now() -> datetime:
    """The time now."""
    return datetime.now(UTC)


def create_app(
    settings: Settings,
    store: JobStore,
    *,
    storage: Storage,
    clock: Callable[[], datetime] = utc_now,
    checks: Sequence[ReadinessCheck] = (),
    stopping: threading.Event | None = None,
    poll_seconds: float = POLL_SECONDS,
    forecast: Forecast | None = None,
    metrics: Metrics | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The ASGI application.

    Args:
        settings: As read at start.
        store: Where jobs, events and tokens are.
        storage: Limited to the storage roots.
        clock: The time now, in UTC.
        checks: What must be well for ``/readyz``, besides the job store.
        stopping: Set by whoever ends the server; event streams end soon after.
        poll_seconds: How often the store is asked for events of watched jobs.
        forecast: Says how long a plan should take; by default nothing is known.
        metrics: What ``/metrics`` shows; by default what the application counts itself.
        tracing: Makes a span for every request.
    """
    version = metadata.version("mergeyard")
    services = Services(
        settings=settings,
        store=store,
        storage=storage,
        clock=clock,
        feed=EventFeed(store, poll_seconds=poll_seconds),
        news=News(store, poll_seconds=poll_seconds),
        forecast=forecast or Forecast(),
        metrics=metrics or Metrics(version),
        guard=AddressGuard(
            settings.webhook_allowed_hosts, allow_loopback=settings.webhook_allow_loopback
        ),
        keys=SecretKeys(
            [key.get_secret_value() for key in settings.secret_keys], settings.secret_key_file
        ),
        integrations=make_integrations(settings),
        checks=(ReadinessCheck("database", store.ping), *checks),
        stopping=stopping or threading.Event(),
        shown_jobs=ShownJobs(store, settings.href),
        streams=StreamSlots(settings.max_streams_per_token),
        failed_logins=FailedLogins(settings.failed_logins_per_minute),
    )
    app = _application(version, _middleware(services, version, tracing))
    app.state.services = services
    return app


def describe_api() -> dict[str, Any]:
    """The OpenAPI document of this version, without a service behind it."""
    return _application(metadata.version("mergeyard"), []).openapi()


def _application(version: str, middleware: Sequence[Middleware]) -> FastAPI:
    app = _Application(
        title="Mergeyard",
        summary="Merges fine-tuned large language models.",
        version=version,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={"default": {"model": Problem, "description": "A problem (RFC 9457)"}},
        middleware=middleware,
        lifespan=_lifespan,
    )
    install_error_handlers(app)
    for module in _ROUTERS:
        app.include_router(module.router)
    return app


def _middleware(services: Services, version: str, tracing: Tracing | None) -> list[Middleware]:
    """From the outside in."""
    authenticator = Authenticator(services.store, services.clock)
    return [
        Middleware(
            RequestContext,
            version=version,
            root_path=services.settings.root_path,
            on_request=services.metrics.count_request,
        ),
        *([Middleware(TracedRequests, tracing=tracing)] if tracing else []),
        Middleware(
            GZipMiddleware,
            minimum_size=_COMPRESS_FROM_BYTES,
            compresslevel=_COMPRESS_LEVEL,
            exclude_content_types=_NOT_COMPRESSED,
        ),
        Middleware(Dashboard, root_path=services.settings.root_path),
        Middleware(
            Authentication,
            authenticator=authenticator,
            rate=RateLimit(services.settings.requests_per_second),
            failures=services.failed_logins,
            trusted_proxies=services.settings.trusted_proxies,
        ),
        Middleware(BodyRules, limit_bytes=services.settings.body_limit_bytes),
        Middleware(Shortcuts, services=services),
    ]


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.openapi()  # now, rather than while the first request waits
    yield
    app.state.services.feed.close()
    app.state.services.news.close()


class _Application(FastAPI):
    """FastAPI, whose OpenAPI document gives problems their own media type."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document; made once."""
        if self.openapi_schema is None:
            made = super().openapi()
            made["components"]["securitySchemes"] = SECURITY_SCHEMES
            for path in made["paths"].values():
                for operation in path.values():
                    content = operation["responses"]["default"]["content"]
                    content[PROBLEM_JSON] = content.pop(next(iter(content)))
        return super().openapi()
