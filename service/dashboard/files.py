"""The dashboard's files: public, since they are the same for everybody and hold no data.

Built by ``dashboard/`` at set-up into ``static/`` beside this module. Every file is known from the
start, so that no address can lead out of the folder.
"""

from __future__ import annotations

import hashlib
import mimetypes
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.dashboard.pages import PAGE_HEADERS, plain_page
from service.paths import route_path

STATIC = Path(__file__).parent / "static"

_INDEX = "/index.html"
_HASHED = "/assets/"
"""Files here have their digest in the name: what they hold never changes."""

_FOR_EVER = "public, max-age=31536000, immutable"
_NOT_OURS = ("/v1/", "/auth", "/healthz", "/readyz", "/metrics", "/openapi.json")
_BASE = b'<base href="/">'


@dataclass(frozen=True, slots=True)
class _File:
    data: bytes
    media_type: str
    etag: str


class Dashboard:
    """Answers what browsers ask outside the API; everything else passes on.

    An address that is no file is one of the dashboard's own views if a page is wanted: it gets
    ``index.html``, whose ``<base href="/">`` is set to the prefix of the service.

    Args:
        app: What to wrap.
        folder: Of the built files; without an ``index.html`` there, people are told so.
        root_path: Prefix under which a proxy publishes the service.
    """

    def __init__(self, app: ASGIApp, *, folder: Path = STATIC, root_path: str = "") -> None:
        self._app = app
        self._files = _load(folder, f'<base href="{root_path}/">'.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with a file or a view, or pass on."""
        is_read = scope["type"] == "http" and scope["method"] in ("GET", "HEAD")
        response = self._answer(scope) if is_read else None
        if response is None:
            await self._app(scope, receive, send)
            return
        scope["state"]["route"] = "dashboard"
        await response(scope, receive, send)

    def _answer(self, scope: Scope) -> Response | None:
        path = route_path(scope) or "/"
        if path.startswith(_NOT_OURS):
            return None
        headers = Headers(scope=scope)
        if path in self._files:
            return _respond(self._files[path], headers, is_hashed=path.startswith(_HASHED))
        if "text/html" not in headers.get("accept", "") or path.startswith(_HASHED):
            return None
        if _INDEX in self._files:
            return _respond(self._files[_INDEX], headers, is_hashed=False)
        return plain_page(
            "The dashboard is not part of this installation",
            "The API and the command line work without it. In a checkout of the source,"
            " 'make dashboard' builds it; released wheels and images have it.",
            status=404 if path != "/" else 200,
        )


def _respond(file: _File, headers: Headers, *, is_hashed: bool) -> Response:
    own = {**PAGE_HEADERS, "ETag": file.etag}
    if is_hashed:
        own["Cache-Control"] = _FOR_EVER
    if file.etag in headers.get("if-none-match", ""):
        return Response(status_code=304, headers=own)
    return Response(file.data, headers=own, media_type=file.media_type)


def _load(folder: Path, base: bytes) -> dict[str, _File]:
    """All files below a folder by address; under a megabyte, so they stay in memory."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            if path.suffix == ".html":
                data = data.replace(_BASE, base)
            kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
            found[f"/{path.relative_to(folder).as_posix()}"] = _File(data, kind, etag)
    return found
