"""Who asks, and what they may do: bearer tokens with scopes.

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

from merging.errors import MergeError
from service.jobs.store import TokenStore
from service.problems import RequestError
from service.settings import ENV_PREFIX, Settings

_TOUCH_INTERVAL = timedelta(minutes=1)
_LONGEST_TOKEN = 512


class Scope(StrEnum):
    """What a token may do; ``admin`` may do everything."""

    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    METRICS_READ = "metrics:read"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Principal:
    """The token that a request came with."""

    token_id: str
    name: str
    scopes: frozenset[str]

    def require(self, scope: Scope) -> None:
        """Raise ``forbidden`` unless the token has the scope."""
        if not self.scopes & {scope, Scope.ADMIN}:
            raise RequestError(
                f"This needs a token with the scope {scope}; the token {self.name!r} has"
                f" {', '.join(sorted(self.scopes)) or 'none'}.",
                code="forbidden",
            )


class Authenticator:
    """Finds the token of a request. Calls block on the store."""

    def __init__(self, tokens: TokenStore, clock: Callable[[], datetime]) -> None:
        self._tokens = tokens
        self._clock = clock

    def authenticate(self, authorization: str | None) -> Principal:
        """The principal of an ``Authorization`` header.

        Raises:
            RequestError: ``unauthenticated`` without a valid token.
        """
        scheme, _, secret = (authorization or "").partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not secret:
            raise RequestError(
                "Send a token with the request: 'Authorization: Bearer <token>'.",
                code="unauthenticated",
            )
        is_plausible = len(secret) <= _LONGEST_TOKEN and secret.isascii() and secret.isprintable()
        token = self._tokens.find_token(secret) if is_plausible else None
        if token is None:
            raise RequestError(
                "The token is not known, has expired or was revoked.", code="unauthenticated"
            )
        if token.last_used_at is None or self._clock() - token.last_used_at > _TOUCH_INTERVAL:
            self._tokens.touch_token(token.id)
        return Principal(token.id, token.name, frozenset(token.scopes))


def prepare_first_token(
    tokens: TokenStore, settings: Settings, announce: Callable[[str], None]
) -> None:
    """Make sure that somebody can use the service.

    A configured administrator's token is imported and never shown. Otherwise, when there is no
    usable token, one is made, written to a file that only this user can read, and announced: this
    once, never at a later start.

    Raises:
        MergeError: ``bad_setting``: the file cannot be written.
    """
    if settings.admin_token is not None:
        tokens.import_token("admin", [Scope.ADMIN], settings.admin_token.get_secret_value())
        return
    if any(token.revoked_at is None for token in tokens.list_tokens()):
        return
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
    announce(f"Administrator's token, shown this once and kept in {path}:\n  {secret}")


def _write_secret(path: Path, secret: str) -> None:
    """Put a file that only this user can read in place, whole; links there are not followed."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # mode 0600
    with os.fdopen(descriptor, "w") as file:
        file.write(secret + "\n")
    Path(name).replace(path)
