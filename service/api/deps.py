"""What routes need, as dependencies."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from difflib import get_close_matches
from fnmatch import fnmatch
from typing import Annotated, Any

import anyio
from fastapi import Depends, Path, Request

from merging.storage.base import Storage
from service.api.answers import ShownJobs
from service.auth import Principal, Scope
from service.feed import EventFeed
from service.forecast import Forecast
from service.integrations.base import Integration
from service.jobs.store import JobStore
from service.limits import FailedLogins, StreamSlots
from service.metrics import Metrics
from service.news import News
from service.problems import RequestError
from service.settings import Settings
from service.webhooks.address_guard import AddressGuard
from service.webhooks.secrets import SecretKeys

_JOB_ID = re.compile(r"job_[0-9a-z]{26}")
LABEL_PREFIX = "label."
"""Of query parameters that filter by label."""

_CONCURRENT_PLANS = 4
"""Planning reads many headers: it has threads of its own, so that other requests keep theirs."""


@dataclass(frozen=True, slots=True)
class ReadinessCheck:
    """Something that must be well for the service to be ready; ``check`` raises if it is not."""

    name: str
    check: Callable[[], None]
    is_required: bool = True


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that routes work with; one per application.

    Attributes:
        settings: As read at start.
        store: Jobs, events, tokens.
        storage: Limited to the storage roots.
        clock: The time now, in UTC.
        feed: Wakes event streams.
        news: What happens to anything.
        forecast: Says how long a plan should take.
        metrics: Counters.
        guard: Which addresses webhooks may go to.
        integrations: Those that are configured, by name.
        keys: From which secrets of webhooks come.
        checks: For ``/readyz``.
        stopping: Set when the server is asked to end.
        streams: Bounds streams of each token.
        failed_logins: Bounds tries to log in that fail, of each address.
        shown_jobs: Jobs as lists show them.
        planning: Bounds plans that are made at once.
    """

    settings: Settings
    store: JobStore
    storage: Storage
    clock: Callable[[], datetime]
    feed: EventFeed
    news: News
    forecast: Forecast
    metrics: Metrics
    guard: AddressGuard
    keys: SecretKeys
    integrations: Mapping[str, Integration]
    checks: Sequence[ReadinessCheck]
    stopping: threading.Event
    streams: StreamSlots
    failed_logins: FailedLogins
    shown_jobs: ShownJobs
    planning: anyio.CapacityLimiter = field(
        default_factory=lambda: anyio.CapacityLimiter(_CONCURRENT_PLANS)
    )

    def href(self, path: str) -> str:
        """An address of this service as clients see it."""
        return self.settings.href(path)


async def _services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


async def _principal(request: Request) -> Principal:
    principal = request.state.principal
    assert isinstance(principal, Principal)
    return principal


async def _job_id(job_id: Annotated[str, Path(description="Id of a job.")]) -> str:
    if not _JOB_ID.fullmatch(job_id):
        raise RequestError(f"There is no job {job_id[:100]}.", code="not_found")
    return job_id


async def _trace_parent(request: Request) -> str | None:
    return getattr(request.state, "traceparent", None)


TraceParent = Annotated[str | None, Depends(_trace_parent)]
ServicesDep = Annotated[Services, Depends(_services)]
PrincipalDep = Annotated[Principal, Depends(_principal)]
JobId = Annotated[str, Depends(_job_id)]

SECURITY_SCHEMES = {
    "HTTPBearer": {"type": "http", "scheme": "bearer", "description": "An API token."}
}
"""For the OpenAPI document; :class:`service.middleware.Authentication` is what looks at tokens."""


def _refuse_unknown_parameters(request: Request, operation: Mapping[str, Any]) -> None:
    """A misspelt filter must not be ignored; the OpenAPI document says what there is."""
    known = [item["name"] for item in operation.get("parameters", ()) if item["in"] == "query"]
    for name in request.query_params:
        if name in known or name.startswith(LABEL_PREFIX):
            continue
        near = get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known) or 'none'}."
        raise RequestError(f"Unknown parameter {name[:100]!r}. {hint}", code="unknown_field")


def _refuse_unacceptable(request: Request, operation: Mapping[str, Any]) -> None:
    """Whoever can only read what this address does not give is told so before anything is done."""
    accept = request.headers.get("accept")
    if not accept or accept == "*/*":
        return
    offered = {
        kind
        for status, response in operation["responses"].items()
        if status.startswith("2")
        for kind in response.get("content", ())
    }
    wanted = [entry.partition(";")[0].strip().lower() for entry in accept.split(",")]
    if offered and not any(fnmatch(kind, pattern) for kind in offered for pattern in wanted):
        raise RequestError(
            f"This address gives {' or '.join(sorted(offered))}, not {accept[:100]}.",
            code="not_acceptable",
        )


def guarded(scope: Scope | None) -> dict[str, Any]:
    """Arguments of a route that only tokens with this scope may use; None is any valid token.

    The scope is shown in the OpenAPI document as ``x-required-scope``.
    """

    async def check(request: Request) -> None:
        if scope is not None:
            (await _principal(request)).require(scope)
        path = request.app.openapi()["paths"][request.scope["route"].path]
        operation = path[request.method.lower()]
        _refuse_unacceptable(request, operation)
        _refuse_unknown_parameters(request, operation)

    security: list[dict[str, list[str]]] = [{name: []} for name in SECURITY_SCHEMES]
    return {
        "dependencies": [Depends(check)],
        "openapi_extra": {
            "security": security,
            "x-required-scope": scope.value if scope else None,
        },
    }
