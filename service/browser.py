"""What browsers need beside tokens: the session's cookie, and the guard against other sites.

A browser sends its cookies wherever a page tells it to; ``SameSite=Strict`` and the check of the
request's origin both keep other sites from acting in the name of somebody who is logged in.
"""

from __future__ import annotations

from datetime import datetime
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from service.problems import RequestError

SESSION_COOKIE = "mergeyard_session"

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


def session_cookie(headers: Headers) -> str | None:
    """The secret that a browser sent, if it sent one."""
    try:
        morsel = SimpleCookie("; ".join(headers.getlist("cookie"))).get(SESSION_COOKIE)
    except CookieError:
        return None
    return morsel.value if morsel else None


def set_session_cookie(
    request: Request, response: Response, secret: str, expires_at: datetime
) -> None:
    """Give the browser a session, for this service only and out of scripts' reach.

    ``Secure`` follows what the request says of itself, the proxy's header included: who forges
    that weakens a cookie of their own.
    """
    forwarded = request.headers.get("x-forwarded-proto", request.url.scheme)
    response.set_cookie(
        SESSION_COOKIE,
        secret,
        expires=expires_at,
        path=request.scope["root_path"] or "/",
        secure=forwarded == "https",
        httponly=True,
        samesite="strict",
    )


def drop_session_cookie(request: Request, response: Response) -> None:
    """Make the browser forget its session."""
    response.delete_cookie(
        SESSION_COOKIE, path=request.scope["root_path"] or "/", httponly=True, samesite="strict"
    )


def refuse_other_sites(method: str, headers: Headers) -> None:
    """Raise ``forbidden`` if a request that may change something was not sent by our own pages.

    ``Sec-Fetch-Site`` is the browser's own word and holds through every proxy. Browsers that do not
    send it (over plain HTTP) name the page's origin, which must be the host that they address.
    """
    if method in _SAFE_METHODS:
        return
    site = headers.get("sec-fetch-site")
    if site is not None:
        is_ours = site == "same-origin"
    else:
        is_ours = headers.get("origin", "").partition("://")[2] == headers["host"]
    if is_ours:
        return
    raise RequestError(
        "With a session's cookie only the pages of this service may change something. Use a token"
        " instead: 'Authorization: Bearer <token>'.",
        code="forbidden",
    )
