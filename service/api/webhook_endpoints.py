"""Webhook endpoints: who is told of what happens to jobs, and how that went."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Path, Query, Response

from service.api.deps import PrincipalDep, Services, ServicesDep, guarded
from service.api.idempotency import (
    IdempotencyKey,
    idempotency_request,
    mark_replayed,
    replays,
)
from service.api.objects import Page
from service.api.pagination import decode_cursor, encode_cursor
from service.api.views import members
from service.api.webhook_objects import (
    DeliveryObject,
    EndpointObject,
    EndpointPatch,
    EndpointRequest,
    EndpointWithSecret,
    RotationRequest,
)
from service.auth import Scope
from service.jobs.errors import RepeatedRequestError
from service.jobs.outbox import DeliveryFilter, DeliveryState, EndpointRecord, NewEndpoint
from service.jobs.records import JobCursor
from service.problems import RequestError

router = APIRouter(prefix="/v1/webhook-endpoints", tags=["webhooks"])

_GUARD = guarded(Scope.WEBHOOKS_WRITE)
_ID = re.compile(r"(whe|dlv)_[0-9a-z]{26}")


async def _endpoint_id(
    endpoint_id: Annotated[str, Path(description="Id of a webhook endpoint.")],
) -> str:
    if not _ID.fullmatch(endpoint_id):
        raise RequestError(f"There is no webhook endpoint {endpoint_id[:100]}.", code="not_found")
    return endpoint_id


async def _delivery_id(
    delivery_id: Annotated[str, Path(description="Id of a delivery.")],
) -> str:
    if not _ID.fullmatch(delivery_id):
        raise RequestError(f"There is no delivery {delivery_id[:100]}.", code="not_found")
    return delivery_id


EndpointId = Annotated[str, Depends(_endpoint_id)]
DeliveryId = Annotated[str, Depends(_delivery_id)]


@router.post(
    "",
    operation_id="webhooks.create",
    status_code=201,
    responses=replays(EndpointWithSecret),
    **_GUARD,
)
def create_endpoint(
    body: EndpointRequest,
    services: ServicesDep,
    principal: PrincipalDep,
    key: IdempotencyKey,
    response: Response,
) -> EndpointWithSecret:
    """Make an endpoint. Its secret is in this answer, and in that to a repeat, and nowhere else."""
    services.guard.check_url(body.url)
    request = idempotency_request(
        key, principal, "/v1/webhook-endpoints", body.model_dump(mode="json")
    )
    new = NewEndpoint(
        url=body.url,
        description=body.description,
        events=tuple(dict.fromkeys(body.events)),
        format=body.format,
        key_id=services.keys.newest_id,
        initiator=principal.token_id,
    )
    try:
        endpoint = services.store.create_endpoint(new, idempotency=request)
    except RepeatedRequestError as repeated:
        endpoint = services.store.get_endpoint(repeated.object_id)
        mark_replayed(response)
    response.headers["Location"] = services.href(f"/v1/webhook-endpoints/{endpoint.id}")
    return _with_secret(services, endpoint)


@router.get("", operation_id="webhooks.list", **_GUARD)
def list_endpoints(services: ServicesDep) -> Page[EndpointObject]:
    """All endpoints, newest first."""
    return Page(data=[_shown(endpoint) for endpoint in services.store.list_endpoints()])


@router.get("/{endpoint_id}", operation_id="webhooks.get", **_GUARD)
def read_endpoint(endpoint_id: EndpointId, services: ServicesDep) -> EndpointObject:
    """One endpoint."""
    return _shown(services.store.get_endpoint(endpoint_id))


@router.patch("/{endpoint_id}", operation_id="webhooks.update", **_GUARD)
def update_endpoint(
    endpoint_id: EndpointId, body: EndpointPatch, services: ServicesDep
) -> EndpointObject:
    """Change an endpoint. What waits for it while it is disabled goes out once it is enabled."""
    if body.url is not None:
        services.guard.check_url(body.url)
    return _shown(services.store.update_endpoint(endpoint_id, body.model_dump(exclude_none=True)))


@router.delete("/{endpoint_id}", operation_id="webhooks.delete", status_code=204, **_GUARD)
def delete_endpoint(endpoint_id: EndpointId, services: ServicesDep) -> None:
    """Forget an endpoint and what waits for it."""
    services.store.delete_endpoint(endpoint_id)


@router.post("/{endpoint_id}/test", operation_id="webhooks.test", status_code=202, **_GUARD)
def test_endpoint(
    endpoint_id: EndpointId, services: ServicesDep, response: Response
) -> DeliveryObject:
    """Send a signed sample (``endpoint.test``), once. Read the delivery to see what came of it."""
    delivery = services.store.test_endpoint(endpoint_id)
    response.headers["Location"] = _place(services, endpoint_id, delivery.id)
    return DeliveryObject.model_validate(members(delivery))


@router.post("/{endpoint_id}/rotate-secret", operation_id="webhooks.rotate", **_GUARD)
def rotate_secret(
    endpoint_id: EndpointId, services: ServicesDep, body: RotationRequest | None = None
) -> EndpointWithSecret:
    """Replace the secret. For a while messages carry a signature of each, the new and the old."""
    overlap = timedelta(seconds=(body or RotationRequest()).overlap_seconds)
    newest = services.keys.newest_id
    return _with_secret(services, services.store.rotate_endpoint(endpoint_id, newest, overlap))


@router.get("/{endpoint_id}/deliveries", operation_id="webhooks.deliveries", **_GUARD)
def list_deliveries(
    endpoint_id: EndpointId,
    services: ServicesDep,
    response: Response,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Annotated[str | None, Query(description="Of the page before.")] = None,
    state: DeliveryState | None = None,
) -> Page[DeliveryObject]:
    """Deliveries of the last thirty days, newest first."""
    chosen = DeliveryFilter(endpoint_id=endpoint_id, state=state)
    seen = None
    if cursor is not None:
        seen, first = decode_cursor(cursor, DeliveryFilter)
        if first.endpoint_id != endpoint_id or state not in (None, first.state):
            raise RequestError("The cursor belongs to another list.", code="bad_cursor")
        chosen = first
    found = services.store.list_deliveries(chosen, cursor=seen, limit=limit + 1)
    data = [DeliveryObject.model_validate(members(delivery)) for delivery in found[:limit]]
    if len(found) <= limit:
        return Page(data=data)
    next_cursor = encode_cursor(JobCursor(data[-1].created_at, data[-1].id), chosen)
    parameters = urlencode({"cursor": next_cursor, "limit": limit})
    next_url = services.href(f"/v1/webhook-endpoints/{endpoint_id}/deliveries?{parameters}")
    response.headers["Link"] = f'<{next_url}>; rel="next"'
    return Page(data=data, next_cursor=next_cursor, next_url=next_url)


@router.get("/{endpoint_id}/deliveries/{delivery_id}", operation_id="webhooks.delivery", **_GUARD)
def read_delivery(
    endpoint_id: EndpointId, delivery_id: DeliveryId, services: ServicesDep
) -> DeliveryObject:
    """One delivery."""
    found = services.store.get_delivery(endpoint_id, delivery_id)
    return DeliveryObject.model_validate(members(found))


@router.post(
    "/{endpoint_id}/deliveries/{delivery_id}/replay",
    operation_id="webhooks.replay",
    status_code=202,
    **_GUARD,
)
def replay_delivery(
    endpoint_id: EndpointId, delivery_id: DeliveryId, services: ServicesDep, response: Response
) -> DeliveryObject:
    """Send a message again, as a new delivery with the same message id."""
    delivery = services.store.replay_delivery(endpoint_id, delivery_id)
    response.headers["Location"] = _place(services, endpoint_id, delivery.id)
    return DeliveryObject.model_validate(members(delivery))


def _place(services: Services, endpoint_id: str, delivery_id: str) -> str:
    return services.href(f"/v1/webhook-endpoints/{endpoint_id}/deliveries/{delivery_id}")


def _shown(endpoint: EndpointRecord) -> EndpointObject:
    return EndpointObject.model_validate(members(endpoint))


def _with_secret(services: Services, endpoint: EndpointRecord) -> EndpointWithSecret:
    secret = services.keys.secret(endpoint)
    return EndpointWithSecret.model_validate({**members(endpoint), "secret": secret})
