"""Who asks, and what they may do: tokens with scopes, sent as such or behind a session's cookie.

Only hashes of tokens are kept, and a token is found by the hash of what was sent: no comparison
runs over the secret itself, so its timing tells nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from merging.errors import MergeError
from service.jobs.records import SessionRecord, TokenRecord
from service.jobs.store import SessionStore, TokenStore
from service.problems import RequestError
from service.settings import ENV_PREFIX, Settings

_TOUCH_INTERVAL = timedelta(minutes=1)
_LONGEST_TOKEN = 512

LOGIN_CODE_LIFETIME = timedelta(seconds=90)
"""How long the link of the first start can be opened."""


class Credentials(TokenStore, SessionStore, Protocol):
    """What the job store knows of those who ask."""


class Scope(StrEnum):
    """What a token may do; ``admin`` may do everything."""

    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    OUTPUT_DELETE = "output:delete"
    WEBHOOKS_WRITE = "webhooks:write"
    METRICS_READ = "metrics:read"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Principal:
    """The token that a request came with, and the session if a browser sent that instead."""

    token_id: str
    name: str
    scopes: frozenset[str]
    session: SessionRecord | None = None

    def has(self, scope: Scope) -> bool:
        """Whether the token has the scope."""
        return bool(self.scopes & {scope, Scope.ADMIN})

    def require(self, scope: Scope) -> None:
        """Raise ``forbidden`` unless the token has the scope."""
        if not self.has(scope):
            raise RequestError(
                f"This needs a token with the scope {scope}; the token {self.name!r} has"
                f" {', '.join(sorted(self.scopes)) or 'none'}.",
                code="forbidden",
            )


class Authenticator:
    """Finds the token of a request."""

    def __init__(self, credentials: Credentials, clock: Callable[[], datetime]) -> None:
        self._credentials = credentials
        self._clock = clock

    def authenticate(self, authorization: str | None, cookie: str | None = None) -> Principal:
        """The principal of an ``Authorization`` header or, without one, of a session's cookie.

        Blocks on the store.

        Raises:
            RequestError: ``unauthenticated`` without a valid token or session.
        """
        if authorization is None and cookie:
            return self._from_session(cookie)
        secret = _bearer_secret(authorization)
        if not secret:
            raise RequestError(
                "Send a token with the request: 'Authorization: Bearer <token>'.",
                code="unauthenticated",
            )
        token = self._credentials.find_token(secret) if _is_plausible(secret) else None
        if token is None:
            raise RequestError(
                "The token is not known, has expired or was revoked.", code="unauthenticated"
            )
        return self._touched(token)

    def recall(self, authorization: str | None) -> Principal | None:
        """The principal of a header that was good a moment ago; None: :meth:`authenticate` it.

        Does not block.
        """
        secret = _bearer_secret(authorization)
        token = self._credentials.recall_token(secret) if _is_plausible(secret) else None
        return None if token is None or self._must_touch(token) else _principal(token)

    def _from_session(self, cookie: str) -> Principal:
        found = self._credentials.find_session(cookie) if _is_plausible(cookie) else None
        if found is None:
            raise RequestError("The session has ended; log in again.", code="unauthenticated")
        session, token = found
        return self._touched(token, session)

    def _touched(self, token: TokenRecord, session: SessionRecord | None = None) -> Principal:
        if self._must_touch(token):
            self._credentials.touch_token(token.id)
        return _principal(token, session)

    def _must_touch(self, token: TokenRecord) -> bool:
        return token.last_used_at is None or self._clock() - token.last_used_at > _TOUCH_INTERVAL


def _principal(token: TokenRecord, session: SessionRecord | None = None) -> Principal:
    return Principal(token.id, token.name, frozenset(token.scopes), session)


def _bearer_secret(authorization: str | None) -> str:
    """What an ``Authorization`` header says after ``Bearer``; empty if it is of another kind."""
    scheme, _, secret = (authorization or "").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""


def _is_plausible(secret: str) -> bool:
    return len(secret) <= _LONGEST_TOKEN and secret.isascii() and secret.isprintable()


def prepare_first_token(tokens: TokenStore, settings: Settings) -> TokenRecord | None:
    """Make sure that somebody can use the service.

    A configured administrator's token is imported and never shown. Otherwise, when there is no
    usable token, one is made and written to a file that only this user can read.

    Returns:
        The token, if this call made one.

    Raises:
        MergeError: ``bad_setting``: the file cannot be written.
    """
    if settings.admin_token is not None:
        tokens.import_token("admin", [Scope.ADMIN], settings.admin_token.get_secret_value())
        return None
    if any(token.revoked_at is None for token in tokens.list_tokens()):
        return None
    token, secret = tokens.create_token("admin", [Scope.ADMIN])
    path = settings.admin_token_file
    try:
        _write_secret(path, secret)
    except OSError as error:
        tokens.revoke_token(token.id)
        raise MergeError(
            f"The first token cannot be written to {path} ({error.strerror}). Make the folder"
            f" writable, or set {ENV_PREFIX}ADMIN_TOKEN.",
            code="bad_setting",
        ) from error
    return token


def _write_secret(path: Path, secret: str) -> None:
    """Put a file that only this user can read in place, whole; links there are not followed."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # mode 0600
    with os.fdopen(descriptor, "w") as file:
        file.write(secret + "\n")
    Path(name).replace(path)
