"""API tokens."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from service.api.deps import PrincipalDep, ServicesDep, guarded
from service.api.idempotency import (
    IdempotencyKey,
    idempotency_request,
    mark_replayed,
    replays,
)
from service.api.objects import NewToken, Page, TokenObject
from service.api.schemas import TokenRequest
from service.api.views import token_object
from service.auth import Scope
from service.jobs.errors import RepeatedRequestError

router = APIRouter(prefix="/v1/tokens", tags=["tokens"])


@router.post(
    "",
    operation_id="tokens.create",
    status_code=201,
    response_model=NewToken,
    responses=replays(TokenObject),
    **guarded(Scope.ADMIN),
)
def create_token(
    body: TokenRequest,
    services: ServicesDep,
    principal: PrincipalDep,
    key: IdempotencyKey,
    response: Response,
) -> NewToken | JSONResponse:
    """Make a token. Its secret is in this answer and nowhere else.

    The repeat of a request shows the token without its secret, since only its hash is kept: if
    the first answer was lost, revoke the token and make another.
    """
    request = idempotency_request(key, principal, "/v1/tokens", body.model_dump(mode="json"))
    try:
        token, secret = services.store.create_token(
            body.name,
            [scope.value for scope in body.scopes],
            expires_at=body.expires_at,
            idempotency=request,
        )
    except RepeatedRequestError as repeated:
        known = token_object(services.store.get_token(repeated.object_id))
        again = JSONResponse(known.model_dump(mode="json"))
        mark_replayed(again)
        again.headers["Location"] = services.href(f"/v1/tokens/{known.id}")
        return again
    response.headers["Location"] = services.href(f"/v1/tokens/{token.id}")
    return NewToken(**token_object(token).model_dump(), secret=secret)


@router.get("", operation_id="tokens.list", **guarded(Scope.ADMIN))
def list_tokens(services: ServicesDep) -> Page[TokenObject]:
    """All tokens, newest first; recognise them by their prefix."""
    return Page(data=[token_object(token) for token in services.store.list_tokens()])


@router.delete("/{token_id}", operation_id="tokens.revoke", **guarded(Scope.ADMIN))
def revoke_token(token_id: str, services: ServicesDep) -> TokenObject:
    """Make a token useless from now on. May be repeated."""
    return token_object(services.store.revoke_token(token_id))
