"""The ``Idempotency-Key`` header (IETF draft): a repeated request makes nothing twice."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any

from fastapi import Depends, Header, Response
from pydantic import BaseModel

from service.auth import Principal
from service.jobs.records import IdempotencyRequest
from service.problems import RequestError

_KEY = re.compile(r"[\x21-\x7e]{1,255}")


async def _key(
    idempotency_key: Annotated[
        str | None,
        Header(
            description="Up to 255 visible ASCII characters, bare or in quotes. A repeat with the"
            " same body within 24 hours is answered with what the first made."
        ),
    ] = None,
) -> str | None:
    if idempotency_key is None:
        return None
    key = idempotency_key
    if len(key) > 2 and key.startswith('"') and key.endswith('"'):
        key = key[1:-1]
    if not _KEY.fullmatch(key):
        raise RequestError("The Idempotency-Key has 1 to 255 visible ASCII characters.")
    return key


IdempotencyKey = Annotated[str | None, Depends(_key)]


def idempotency_request(
    key: str | None, principal: Principal, path: str, body: Any
) -> IdempotencyRequest | None:
    """A key with its scope: the token, the address, and a fingerprint of the body."""
    if key is None:
        return None
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return IdempotencyRequest(
        owner=principal.token_id,
        method="POST",
        path=path,
        key=key,
        fingerprint=hashlib.sha256(canonical.encode()).hexdigest(),
    )


def mark_replayed(response: Response) -> None:
    """Say that this answer shows what an earlier request made."""
    response.status_code = 200
    response.headers["Idempotency-Replayed"] = "true"


def replays(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """``responses`` of a route that makes something: what a repeat is answered with."""
    return {200: {"description": "What the key made first", "model": model}}
