"""Reads from an S3 server that breaks off, throttles or lies; the client is the real one."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from merging.errors import StorageError
from merging.storage.retry import RetryPolicy
from merging.storage.s3 import S3Storage
from tests.support.s3_stand_in import ETAG, MisbehavingS3, misbehaving_s3

URI = "s3://bucket/weights.bin"
SIZE = 3_000_000


@pytest.fixture(autouse=True)
def _some_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MisbehavingS3]:
    with misbehaving_s3(secrets.token_bytes(SIZE)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        yield server


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def storage(waits: list[float]) -> S3Storage:
    return S3Storage(RetryPolicy(max_attempts=4, sleep=waits.append))


def _read(storage: S3Storage, start: int = 0, length: int = SIZE) -> bytes:
    buffer = bytearray(length)
    storage.read_into(URI, start, memoryview(buffer), version=ETAG)
    return bytes(buffer)


def _error(storage: S3Storage) -> StorageError:
    with pytest.raises(StorageError) as caught:
        _read(storage)
    return caught.value


def test_a_body_that_breaks_off_is_taken_up_where_it_stopped(
    server: MisbehavingS3, storage: S3Storage, waits: list[float]
) -> None:
    server.cut_after = [1_500_000, 700_000]

    assert _read(storage) == server.body

    starts = [int(asked.removeprefix("bytes=").split("-")[0]) for asked in server.ranges]
    assert starts[0] == 0
    assert 0 < starts[1] <= 1_500_000
    assert starts[1] <= starts[2] <= starts[1] + 700_000
    assert len(waits) == 2


def test_a_body_that_always_breaks_off_is_given_up(
    server: MisbehavingS3, storage: S3Storage, waits: list[float]
) -> None:
    server.cut_after = [0] * 10

    error = _error(storage)

    assert (error.code, error.retryable, error.context["attempts"]) == ("unavailable", True, 4)
    assert (len(server.ranges), len(waits)) == (4, 3)


def test_a_small_object_that_breaks_off_is_read_again(
    server: MisbehavingS3, storage: S3Storage
) -> None:
    server.cut_after = [1000]

    assert storage.read_bytes(URI, limit=SIZE) == server.body


@pytest.mark.parametrize(("status", "code"), [(503, "throttled"), (500, "unavailable")])
def test_a_busy_or_failing_server_is_asked_again_and_only_by_one_layer(
    server: MisbehavingS3, storage: S3Storage, waits: list[float], status: int, code: str
) -> None:
    server.statuses = [status] * 3
    assert _read(storage, 17, 1000) == server.body[17:1017]
    assert (len(server.ranges), len(waits)) == (4, 3)

    server.statuses = [status] * 4
    assert _error(storage).code == code
    assert len(server.ranges) == 8


def test_an_object_that_changes_between_two_attempts_is_not_mixed(
    server: MisbehavingS3, storage: S3Storage
) -> None:
    class ChangingEtags(list[int]):
        def pop(self, index: int = -1) -> int:
            server.etag = '"another"'
            return super().pop(index)

    server.cut_after = ChangingEtags([1_500_000])

    assert _error(storage).code == "source_changed"


def test_a_server_that_ignores_conditions_is_seen_through(
    server: MisbehavingS3, storage: S3Storage
) -> None:
    server.honours_conditions = False
    server.etag = '"another"'

    assert _error(storage).code == "source_changed"


def test_a_server_that_ignores_ranges_is_refused(server: MisbehavingS3, storage: S3Storage) -> None:
    server.honours_ranges = False

    error = _error(storage)

    assert (error.code, error.retryable) == ("unavailable", False)
    assert "ignores ranges" in error.detail


def test_a_server_that_is_not_there_is_named_by_its_setting(
    server: MisbehavingS3, storage: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")  # nothing listens there

    error = _error(storage)

    assert (error.code, error.context["attempts"]) == ("unavailable", 4)
    assert "AWS_ENDPOINT_URL_S3" in error.detail


@pytest.mark.parametrize("endpoint", ["no-scheme", "ftp//x:y"])
def test_a_malformed_endpoint_is_named_by_its_setting(
    storage: S3Storage, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)

    assert "AWS_ENDPOINT_URL_S3" in _error(storage).detail


def test_missing_credentials_are_named_by_their_settings(
    server: MisbehavingS3, storage: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)

    error = _error(storage)

    assert error.code == "denied"
    assert "AWS_ACCESS_KEY_ID" in error.detail
