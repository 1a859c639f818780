"""Takes secrets out of text that people will read: the last line of defence for logs.

Nothing of ours puts a secret into a message; other people's exceptions might.
"""

from __future__ import annotations

import functools
import os
import re

from structlog.typing import EventDict

_HIDDEN = "***"
_SHORTEST = 8
"""Shorter values of variables are not looked for: they would also be found in innocent text."""

_PATTERNS = (
    (re.compile(r"(://[^/\s:@]*:)[^/\s@]+@"), r"\1***@"),  # passwords in addresses
    (re.compile(r"\bmergeyard_[0-9A-Za-z]{16,}"), f"mergeyard_{_HIDDEN}"),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), _HIDDEN),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), rf"\1 {_HIDDEN}"),
    (
        re.compile(
            r"(?i)((?:secret|passw|signature|credential|session_?token|api_?key)[\w-]*[\"']?"
            r"\s*[=:]\s*[\"']?)[^\s\"'&,;]{4,}"
        ),
        rf"\1{_HIDDEN}",
    ),
)
_HINT = re.compile(r"[\s:=]|mergeyard_|A[KS]IA")
"""Is in every text that one of the patterns fits; most texts of log lines have none of it."""

_SECRET_NAME = re.compile(r"SECRET|PASSWORD|TOKEN|ACCESS_KEY|DATABASE_URL")


def redact(text: str) -> str:
    """The text with what looks like a secret, or is one of this process's, replaced by stars."""
    own = _own_secrets()
    if own is not None:
        text = own.sub(_HIDDEN, text)
    if not _HINT.search(text):
        return text
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def redact_event(_logger: object, _method: str, event: EventDict) -> EventDict:
    """:func:`redact` for every text of a log line; a processor of structlog."""
    return {key: redact(value) if isinstance(value, str) else value for key, value in event.items()}


@functools.cache
def _own_secrets() -> re.Pattern[str] | None:
    """Values of variables of the environment whose names say that they are secret."""
    values = {
        value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST and not value.startswith("/")
    }
    longest_first = sorted(values, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if values else None
