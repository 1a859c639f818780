from __future__ import annotations

from collections.abc import Iterator

import pytest

from workers.redact import _own_secrets, redact, redact_event


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    monkeypatch.setenv("SOME_TOKEN", "short")
    monkeypatch.setenv("TOKEN_FILE_PASSWORD", "/run/secrets/file")
    _own_secrets.cache_clear()
    yield
    _own_secrets.cache_clear()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("key wJalrXUtnFEMI/K7MDENG is bad", "key *** is bad"),
        ("postgresql://merge:hunter2@db/jobs", "postgresql://merge:***@db/jobs"),
        ("redis://:hunter2@db", "redis://:***@db"),
        ("used mergeyard_0123456789abcdefXYZ.", "used mergeyard_***."),
        ("AKIAIOSFODNN7EXAMPLE was refused", "*** was refused"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        ("?X-Amz-Signature=0a1b2c&x=1", "?X-Amz-Signature=***&x=1"),
        ('{"secret_key": "abcdefgh"}', '{"secret_key": "***"}'),
        ("password=hunter2 host=db", "password=*** host=db"),
    ],
)
def test_what_looks_like_a_secret_is_replaced(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "short is not looked for",
        "s3://bucket/models/a@v2",
        "http://127.0.0.1:8000/v1/jobs/job_0123456789abcdefghjkmnpqrs",
        "12,345 tokens; nats per token: 1.4",
        "the token tok_01 has expired; /run/secrets/file",
        "sha256:0123456789abcdef0123456789abcdef",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert redact(text) == text


def test_a_log_line_loses_the_secrets_in_its_values() -> None:
    event = {"event": "x", "url": "s3://a:bcdef@host", "count": 3}
    assert redact_event(None, "info", event) == {"event": "x", "url": "s3://a:***@host", "count": 3}
