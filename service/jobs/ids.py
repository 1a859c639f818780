"""Identifiers: opaque, prefixed, ordered by time of creation."""

from __future__ import annotations

import secrets
from datetime import datetime

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u
_RANDOM_BITS = 80
_LENGTH = 26  # 48 bits of milliseconds and 80 of chance, 5 bits a character


def new_id(prefix: str, now: datetime) -> str:
    """``prefix_`` and 26 characters: the time in milliseconds, then chance."""
    value = int(now.timestamp() * 1000) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
    digits = (_ALPHABET[value >> 5 * place & 31] for place in reversed(range(_LENGTH)))
    return f"{prefix}_{''.join(digits)}"
