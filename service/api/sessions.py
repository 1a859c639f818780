"""Sessions of browsers: a token, or the link of the first start, for a cookie."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.responses import RedirectResponse

from service.api.deps import PrincipalDep, Services, ServicesDep, guarded
from service.api.objects import SessionObject
from service.auth import Principal
from service.browser import drop_session_cookie, set_session_cookie
from service.dashboard.pages import plain_page
from service.jobs.records import SessionRecord
from service.problems import RequestError

router = APIRouter(tags=["sessions"])


@router.post("/v1/sessions", operation_id="sessions.create", status_code=201, **guarded(None))
def create_session(
    request: Request, response: Response, services: ServicesDep, principal: PrincipalDep
) -> SessionObject:
    """Log a browser in with the token of this request: sets a cookie that stands for it.

    The session ends with the token, when somebody logs out, or after a time; it cannot be prolonged
    by itself.
    """
    if principal.session is not None:
        raise RequestError(
            "A session begins with a token: 'Authorization: Bearer <token>'.", code="forbidden"
        )
    session = _begin(services, request, response, principal.token_id)
    response.headers["Location"] = services.href("/v1/sessions/current")
    return _session_object(principal, session)


@router.get("/v1/sessions/current", operation_id="sessions.get", **guarded(None))
def read_session(principal: PrincipalDep) -> SessionObject:
    """Who asks, and what they may do; with a token that was sent itself, ``id`` is null."""
    return _session_object(principal, principal.session)


@router.delete(
    "/v1/sessions/current", operation_id="sessions.delete", status_code=204, **guarded(None)
)
def end_session(
    request: Request, response: Response, services: ServicesDep, principal: PrincipalDep
) -> None:
    """Log out. A token that was sent itself stays valid."""
    if principal.session is not None:
        services.store.end_session(principal.session.id)
    drop_session_cookie(request, response)


@router.get("/auth", operation_id="sessions.open", include_in_schema=False)
def open_link(
    request: Request, services: ServicesDep, code: Annotated[str, Query(max_length=200)] = ""
) -> Response:
    """The link of the first start: once, a code for a session and the way to the dashboard."""
    address = request.state.client_address
    services.failed_logins.check(address)
    token_id = services.store.redeem_login_code(code)
    if token_id is None:
        services.failed_logins.note_failure(address)
        return plain_page(
            "This link is of no use any more",
            "It works once, for a short time after the first start. Log in with a token instead:"
            " the first one is in the file that the service named.",
            status=401,
        )
    response = RedirectResponse(services.href("/"), status_code=303)
    _begin(services, request, response, token_id)
    return response


def _begin(
    services: Services, request: Request, response: Response, token_id: str
) -> SessionRecord:
    lifetime = timedelta(hours=services.settings.session_hours)
    session, secret = services.store.create_session(token_id, lifetime)
    set_session_cookie(request, response, secret, session.expires_at)
    return session


def _session_object(principal: Principal, session: SessionRecord | None) -> SessionObject:
    return SessionObject(
        id=session.id if session else None,
        created_at=session.created_at if session else None,
        expires_at=session.expires_at if session else None,
        token_id=principal.token_id,
        token_name=principal.name,
        scopes=sorted(principal.scopes),
    )
