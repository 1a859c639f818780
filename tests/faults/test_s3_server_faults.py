"""A real S3 server that loses answers, refuses keys, or dies and comes back."""

from __future__ import annotations

import secrets
import threading
from typing import Any

import pytest
from botocore.exceptions import ConnectionClosedError

from examples.s3_server import S3Server, s3_server
from merging.errors import StorageError
from merging.storage.retry import RetryPolicy
from merging.storage.s3 import S3Storage
from merging.storage.s3_connection import S3Connection

pytestmark = pytest.mark.s3

MIB = 1 << 20


@pytest.fixture
def lose_answer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the next answer to an operation get lost after the server has acted on it."""
    send = S3Connection.send
    to_lose: list[str] = []

    def send_and_lose(self: S3Connection, operation: str, **parameters: Any) -> Any:
        answer = send(self, operation, **parameters)
        if operation in to_lose:
            to_lose.remove(operation)
            raise ConnectionClosedError(endpoint_url="http://lost")
        return answer

    monkeypatch.setattr(S3Connection, "send", send_and_lose)
    return to_lose.append


@pytest.fixture
def storage() -> S3Storage:
    return S3Storage(RetryPolicy(sleep=lambda _: None))


def test_a_claim_whose_answer_is_lost_is_still_ours(
    s3_env: S3Server, bucket: str, storage: S3Storage, lose_answer: Any
) -> None:
    uri = f"s3://{bucket}/claim"
    lose_answer("put_object")

    assert storage.write_bytes(uri, b"mine", if_absent=True) == storage.stat(uri)

    lose_answer("put_object")
    with pytest.raises(StorageError) as caught:
        storage.write_bytes(uri, b"mine", if_absent=True)
    assert caught.value.code == "already_exists"


@pytest.mark.parametrize(
    "operation", ["create_multipart_upload", "upload_part", "complete_multipart_upload"]
)
def test_a_streamed_write_survives_a_lost_answer(
    s3_env: S3Server, bucket: str, storage: S3Storage, lose_answer: Any, operation: str
) -> None:
    uri = f"s3://{bucket}/weights.bin"
    data = secrets.token_bytes(9 * MIB)
    lose_answer(operation)

    with storage.open_writer(uri, len(data)) as writer:
        writer.write(data)
        written = writer.commit()

    assert written == storage.stat(uri)
    assert storage.read_bytes(uri, limit=len(data)) == data


def test_a_failed_part_fails_the_write_and_leaves_no_upload(
    s3_env: S3Server, bucket: str, storage: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = S3Connection.send

    def refuse_part_three(self: S3Connection, operation: str, **parameters: Any) -> Any:
        if parameters.get("PartNumber") == 3:
            raise PermissionError
        return send(self, operation, **parameters)

    monkeypatch.setattr(S3Connection, "send", refuse_part_three)
    uri = f"s3://{bucket}/weights.bin"
    size = 100 * MIB

    def write() -> None:
        with storage.open_writer(uri, size) as writer:
            for _ in range(size // MIB):
                writer.write(bytes(MIB))
            writer.commit()

    with pytest.raises(StorageError):
        write()

    assert storage.list(f"s3://{bucket}") == []
    assert "Uploads" not in s3_env.client().list_multipart_uploads(Bucket=bucket)


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_refused_keys_are_named_by_their_settings_and_never_shown(
    s3_env: S3Server,
    bucket: str,
    storage: S3Storage,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setenv(name, "wrong-value")

    with pytest.raises(StorageError) as caught:
        storage.write_bytes(f"s3://{bucket}/a", b"x")

    error = caught.value
    assert (error.code, error.retryable) == ("denied", False)
    assert "AWS_ACCESS_KEY_ID" in error.detail
    shown = str(error.to_dict())
    for secret in ("wrong-value", s3_env.access_key, s3_env.secret_key):
        assert secret not in shown


def test_a_missing_bucket_is_named(s3_env: S3Server, storage: S3Storage) -> None:
    for call in (storage.stat, lambda uri: storage.read_bytes(uri, limit=1)):
        with pytest.raises(StorageError) as caught:
            call("s3://no-such-bucket-here/a")
        assert caught.value.code == "not_found"
        assert "bucket" in caught.value.detail
        assert "no such bucket" in caught.value.detail


def test_reads_and_writes_outlive_a_crash_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    data = secrets.token_bytes(36 * MIB)
    with s3_server() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        server.create_bucket("models")
        # More attempts than by default: the restart may be slow on a busy machine.
        storage = S3Storage(RetryPolicy(max_attempts=200, cap_seconds=0.5))
        before = storage.write_bytes("s3://models/before", data[:MIB])

        with storage.open_writer("s3://models/weights.bin", len(data)) as writer:
            writer.write(data[: 20 * MIB])
            server.kill()
            restart = threading.Thread(target=server.start)
            restart.start()
            writer.write(data[20 * MIB :])
            written = writer.commit()
        restart.join()

        server.kill()
        restart = threading.Thread(target=server.start)
        restart.start()
        buffer = bytearray(MIB)
        storage.read_into(before.uri, 0, memoryview(buffer), version=before.version)
        restart.join()

        assert bytes(buffer) == data[:MIB]
        assert storage.stat("s3://models/weights.bin") == written
        assert storage.read_bytes("s3://models/weights.bin", limit=len(data)) == data
