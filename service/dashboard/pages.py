"""Plain pages for people, where the dashboard itself cannot say something."""

from __future__ import annotations

from html import escape

from starlette.responses import HTMLResponse

DASHBOARD_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " font-src 'self'; connect-src 'self'; manifest-src 'self'; worker-src 'self';"
    " base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""Everything comes from this service; no script or style stands in a page itself."""

PAGE_HEADERS = {"Content-Security-Policy": DASHBOARD_CSP, "Cache-Control": "no-cache"}


def plain_page(title: str, text: str, *, status: int = 200) -> HTMLResponse:
    """A page that needs no file, script or style."""
    body = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)} · Mergeyard</title></head>"
        f"<body><h1>{escape(title)}</h1><p>{escape(text)}</p></body></html>"
    )
    return HTMLResponse(body, status, headers=PAGE_HEADERS)
