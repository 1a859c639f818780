"""Probes, metrics and versions."""

from __future__ import annotations

from importlib import metadata
from typing import Literal

import anyio
import anyio.to_thread
import structlog
from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from merging.errors import MergeError
from merging.plan.plan import PLAN_FORMAT
from service.api.deps import ReadinessCheck, ServicesDep, guarded
from service.api.errors import request_facts
from service.api.objects import CheckObject, Health, Readiness, Version
from service.auth import Scope
from service.problems import problem, problem_response

router = APIRouter(tags=["service"])

_CHECK_SECONDS = 5
_SHOWN_PACKAGES = ("torch", "safetensors", "ray", "fastapi", "sqlalchemy")


@router.get("/healthz", operation_id="service.health", openapi_extra={"security": []})
async def healthz() -> Health:
    """The process answers; nothing else is looked at."""
    return Health()


@router.get(
    "/readyz",
    operation_id="service.ready",
    response_model=Readiness,
    openapi_extra={"security": []},
)
async def readyz(request: Request, services: ServicesDep) -> Response | Readiness:
    """Whether the service can work: one entry for each thing that it needs."""
    checks = [await _run(check) for check in services.checks]
    if services.stopping.is_set():
        checks.append(CheckObject(name="serving", status="failed", is_required=True))
    failed = [entry.name for entry in checks if entry.is_required and entry.status == "failed"]
    if not failed:
        return Readiness(status="ready", checks=checks)
    body = problem("not_ready", f"Not ready: {', '.join(failed)}.", **request_facts(request))
    body["checks"] = [entry.model_dump() for entry in checks]
    return problem_response(body)


async def _run(check: ReadinessCheck) -> CheckObject:
    """The reason of a failure goes to the log only: probes come without a token."""
    status: Literal["ok", "failed"] = "failed"
    try:
        with anyio.fail_after(_CHECK_SECONDS):
            await anyio.to_thread.run_sync(check.check, abandon_on_cancel=True)
        status = "ok"
    except (MergeError, TimeoutError) as error:
        log = structlog.get_logger("mergeyard.health")
        log.warning("check_failed", check=check.name, reason=str(error) or "no answer in time")
    return CheckObject(name=check.name, status=status, is_required=check.is_required)


@router.get(
    "/metrics",
    operation_id="service.metrics",
    response_class=PlainTextResponse,
    **guarded(Scope.METRICS_READ),
)
def read_metrics(services: ServicesDep) -> Response:
    """Counters in the text format of Prometheus."""
    overdue = services.store.longest_overdue().total_seconds()
    num_streams = services.feed.num_readers + services.news.num_readers
    text = services.metrics.render(services.store.counts(), num_streams, overdue)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/version", operation_id="service.version", **guarded(None))
def read_version() -> Version:
    """Versions of the server, of the API, and of what the engine stands on."""
    return Version(
        version=metadata.version("mergeyard"),
        api="v1",
        plan_format=PLAN_FORMAT,
        packages={name: metadata.version(name) for name in _SHOWN_PACKAGES},
    )
