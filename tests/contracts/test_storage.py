"""What every kind of storage promises, asked of each of them."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from merging.errors import StorageError
from merging.storage import s3 as s3_module
from merging.storage.base import Storage, Writer
from merging.storage.router import open_storage
from merging.storage.s3_connection import S3Connection

MIB = 1 << 20


@dataclass
class Place:
    """An empty folder on some storage.

    Attributes:
        unpublished: Lists what unfinished writes have left behind.
    """

    storage: Storage
    folder: str
    unpublished: Callable[[], list[str]]


def _local_place(tmp_path: Path) -> Place:
    folder = tmp_path / "folder"

    def unpublished() -> list[str]:
        return [path.name for path in folder.rglob(".mergeyard-*")]

    return Place(open_storage(), str(folder), unpublished)


def _s3_place(request: pytest.FixtureRequest) -> Place:
    server = request.getfixturevalue("s3_env")
    bucket = request.getfixturevalue("bucket")

    def unpublished() -> list[str]:
        answer = server.client().list_multipart_uploads(Bucket=bucket)
        return [upload["Key"] for upload in answer.get("Uploads", ())]

    return Place(open_storage(), f"s3://{bucket}/folder", unpublished)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return _local_place(tmp_path) if request.param == "local" else _s3_place(request)


@pytest.fixture
def storage(place: Place) -> Storage:
    return place.storage


@pytest.fixture
def folder(place: Place) -> str:
    return place.folder


def _write(storage: Storage, uri: str, data: bytes, piece: int = 3 * MIB + 17) -> str:
    """Write in pieces from one buffer that is used again at once; returns the version."""
    buffer = bytearray(piece)
    with storage.open_writer(uri, len(data)) as writer:
        for start in range(0, len(data), piece):
            chunk = data[start : start + piece]
            buffer[: len(chunk)] = chunk
            writer.write(memoryview(buffer)[: len(chunk)])
            buffer[:] = bytes(piece)
        return writer.commit().version


def _read(storage: Storage, uri: str, start: int, length: int, version: str) -> bytes:
    buffer = bytearray(length)
    storage.read_into(uri, start, memoryview(buffer), version=version)
    return bytes(buffer)


def _code(call: Callable[[], object]) -> str:
    with pytest.raises(StorageError) as caught:
        call()
    return caught.value.code


def test_stat_gives_address_size_and_the_version_that_the_write_returned(
    storage: Storage, folder: str
) -> None:
    written = storage.write_bytes(f"{folder}/a.bin", b"12345")

    assert storage.stat(f"{folder}//a.bin" if folder.startswith("/") else written.uri) == written
    assert written.uri == f"{folder}/a.bin"
    assert written.size == 5


def test_list_is_recursive_sorted_and_agrees_with_stat(storage: Storage, folder: str) -> None:
    names = ["b", "a/deep/er", "a-b", "a/x", "é ü+%41.bin"]
    for name in names:
        storage.write_bytes(f"{folder}/{name}", name.encode())
    storage.write_bytes(f"{folder}-of-others/c", b"c")

    listed = storage.list(folder)

    assert [entry.uri for entry in listed] == sorted(f"{folder}/{name}" for name in names)
    assert listed == [storage.stat(entry.uri) for entry in listed]
    assert storage.list(f"{folder}/") == listed


def test_list_of_nothing_is_empty(storage: Storage, folder: str) -> None:
    storage.write_bytes(f"{folder}/file", b"x")

    assert storage.list(f"{folder}/absent") == []
    assert storage.list(f"{folder}/file") == []


@pytest.mark.s3
def test_list_goes_through_all_pages(
    s3_env: object, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = S3Connection.send
    pages: list[str] = []

    def send_with_small_pages(self: S3Connection, operation: str, **parameters: Any) -> Any:
        if operation == "list_objects_v2":
            pages.append(operation)
            parameters["MaxKeys"] = 4
        return send(self, operation, **parameters)

    monkeypatch.setattr(S3Connection, "send", send_with_small_pages)
    storage = open_storage()
    uris = [storage.write_bytes(f"s3://{bucket}/{n:02}", b"").uri for n in range(11)]

    assert [entry.uri for entry in storage.list(f"s3://{bucket}")] == uris
    assert len(pages) == 3


@pytest.mark.parametrize(
    ("start", "length"),
    [(0, 0), (0, 1), (99, 1), (100, 0), (0, 100), (17, 50), (1, 99)],
)
def test_ranges_within_an_object_are_read(
    storage: Storage, folder: str, start: int, length: int
) -> None:
    data = secrets.token_bytes(100)
    version = storage.write_bytes(f"{folder}/a", data).version

    assert _read(storage, f"{folder}/a", start, length, version) == data[start : start + length]


@pytest.mark.parametrize(("start", "length"), [(0, 101), (99, 2), (100, 1), (5000, 10)])
def test_a_range_past_the_end_is_an_error(
    storage: Storage, folder: str, start: int, length: int
) -> None:
    version = storage.write_bytes(f"{folder}/a", bytes(100)).version

    assert _code(lambda: _read(storage, f"{folder}/a", start, length, version)) == "out_of_range"


def test_reads_from_many_threads_each_get_their_own_bytes(storage: Storage, folder: str) -> None:
    data = secrets.token_bytes(4 * MIB)
    version = _write(storage, f"{folder}/a", data)
    starts = range(0, len(data) - 100_000, 97_531)

    with ThreadPoolExecutor(8) as threads:
        pieces = list(
            threads.map(lambda s: _read(storage, f"{folder}/a", s, 100_000, version), starts)
        )

    assert pieces == [data[start : start + 100_000] for start in starts]


def test_a_pinned_read_of_an_overwritten_object_is_refused(storage: Storage, folder: str) -> None:
    uri = f"{folder}/a"
    version = storage.write_bytes(uri, b"before").version
    storage.write_bytes(uri, b"after!")

    assert _code(lambda: _read(storage, uri, 0, 3, version)) == "source_changed"
    assert _code(lambda: storage.read_bytes(uri, limit=10, version=version)) == "source_changed"
    assert _code(lambda: storage.copy(uri, f"{uri}2", version=version)) == "source_changed"
    assert storage.read_bytes(uri, limit=10) == b"after!"


def test_a_small_object_is_read_whole_up_to_the_limit(storage: Storage, folder: str) -> None:
    uri = f"{folder}/a"
    version = storage.write_bytes(uri, b"12345").version
    storage.write_bytes(f"{folder}/empty", b"")

    assert storage.read_bytes(uri, limit=5) == b"12345"
    assert storage.read_bytes(uri, limit=5, version=version) == b"12345"
    assert storage.read_bytes(f"{folder}/empty", limit=0) == b""
    assert _code(lambda: storage.read_bytes(uri, limit=4)) == "too_large"


@pytest.mark.parametrize("size", [0, 1, 8 * MIB, 8 * MIB + 1, 16 * MIB, 27 * MIB + 5])
def test_a_streamed_object_is_what_was_written(place: Place, size: int) -> None:
    uri = f"{place.folder}/deep/weights.bin"
    data = secrets.token_bytes(size)

    version = _write(place.storage, uri, data)

    assert place.storage.stat(uri).version == version
    assert place.storage.stat(uri).size == size
    assert place.storage.read_bytes(uri, limit=size, version=version) == data
    assert place.unpublished() == []


@pytest.mark.parametrize("size", [1000, 20 * MIB])
def test_nothing_is_visible_before_commit(storage: Storage, folder: str, size: int) -> None:
    uri = f"{folder}/a"
    with storage.open_writer(uri, size) as writer:
        writer.write(bytes(size))
        assert _code(lambda: storage.stat(uri)) == "not_found"
        assert storage.list(folder) == []
        writer.commit()

    assert storage.stat(uri).size == size


@pytest.mark.parametrize("size", [1000, 20 * MIB])
def test_an_aborted_write_leaves_nothing_and_spares_what_was_there(place: Place, size: int) -> None:
    uri = f"{place.folder}/a"
    before = place.storage.write_bytes(uri, b"before")

    def write_and_fail(writer: Writer) -> None:
        with writer:
            writer.write(bytes(size - 1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail(place.storage.open_writer(uri, size))

    assert place.storage.list(place.folder) == [before]
    assert place.unpublished() == []


def test_abort_is_harmless_after_commit_and_twice(place: Place) -> None:
    writer = place.storage.open_writer(f"{place.folder}/a", 3)
    writer.write(b"abc")
    writer.commit()
    writer.abort()
    other = place.storage.open_writer(f"{place.folder}/b", 3)
    other.abort()
    other.abort()

    assert [entry.uri for entry in place.storage.list(place.folder)] == [f"{place.folder}/a"]


@pytest.mark.parametrize("size", [1000, 20 * MIB])
def test_a_write_of_another_length_than_announced_is_not_published(place: Place, size: int) -> None:
    def write(length: int) -> None:
        with place.storage.open_writer(f"{place.folder}/a", size) as writer:
            writer.write(bytes(length))
            writer.commit()

    assert _code(lambda: write(size - 1)) == "size_mismatch"
    assert _code(lambda: write(size + 1)) == "size_mismatch"
    assert place.storage.list(place.folder) == []
    assert place.unpublished() == []


def test_a_writer_holds_no_more_than_it_says(storage: Storage, folder: str) -> None:
    with storage.open_writer(f"{folder}/a", 10**9) as writer:
        assert writer.buffer_bytes <= 5 * 8 * MIB
    with storage.open_writer(f"{folder}/a", 1000) as writer:
        assert writer.buffer_bytes <= 1000


@pytest.mark.parametrize("size", [1000, 20 * MIB, 100 * MIB])
def test_what_a_writer_will_hold_is_known_before(storage: Storage, folder: str, size: int) -> None:
    uri = f"{folder}/object"
    with storage.open_writer(uri, size) as writer:
        assert storage.writer_bytes(uri, size) == writer.buffer_bytes


def test_of_many_racing_creators_exactly_one_wins(storage: Storage, folder: str) -> None:
    uri = f"{folder}/claim"
    start = threading.Barrier(8)

    def create(name: str) -> str:
        start.wait()
        try:
            storage.write_bytes(uri, name.encode(), if_absent=True)
        except StorageError as error:
            return error.code
        return name

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(create, [f"thread {n}" for n in range(8)]))

    winners = [outcome for outcome in outcomes if outcome != "already_exists"]
    assert len(winners) == 1
    assert storage.read_bytes(uri, limit=100).decode() == winners[0]


def test_writing_replaces_unless_told_otherwise(place: Place) -> None:
    uri = f"{place.folder}/a"
    place.storage.write_bytes(uri, b"one", if_absent=True)
    replaced = place.storage.write_bytes(uri, b"two")

    assert (
        _code(lambda: place.storage.write_bytes(uri, b"three", if_absent=True)) == "already_exists"
    )
    assert place.storage.stat(uri) == replaced
    assert place.unpublished() == []


def test_delete_can_be_repeated(storage: Storage, folder: str) -> None:
    storage.write_bytes(f"{folder}/a", b"x")

    storage.delete(f"{folder}/a")
    storage.delete(f"{folder}/a")
    storage.delete(f"{folder}/never/there")

    assert _code(lambda: storage.stat(f"{folder}/a")) == "not_found"


def test_a_folder_goes_only_when_it_holds_nothing(storage: Storage, folder: str) -> None:
    storage.write_bytes(f"{folder}/in/a", b"x")
    for held in (f"{folder}/in", folder, f"{folder}/in/a", f"{folder}/never"):
        storage.remove_folder(held)
    assert storage.read_bytes(f"{folder}/in/a", limit=1) == b"x"

    storage.delete(f"{folder}/in/a")
    for empty in (f"{folder}/in", folder):
        storage.remove_folder(empty)
        assert not Path(empty).exists()


@pytest.mark.parametrize("size", [0, 10, 12 * MIB + 1])
def test_a_copy_is_identical(storage: Storage, folder: str, size: int) -> None:
    data = secrets.token_bytes(size)
    version = _write(storage, f"{folder}/a b+ü", data)

    copied = storage.copy(f"{folder}/a b+ü", f"{folder}/deep/copy", version=version)

    assert copied == storage.stat(f"{folder}/deep/copy")
    assert storage.read_bytes(copied.uri, limit=size, version=copied.version) == data


def test_a_large_copy_in_parts_is_identical(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    # Stands in for objects above 5 GB, which S3 copies in parts only.
    monkeypatch.setattr(s3_module, "_COPY_LIMIT_BYTES", 10 * MIB)
    monkeypatch.setattr(s3_module, "_COPY_PART_BYTES", 5 * MIB)
    data = secrets.token_bytes(12 * MIB + 1)
    version = _write(place.storage, f"{place.folder}/a", data)

    copied = place.storage.copy(f"{place.folder}/a", f"{place.folder}/b", version=version)

    assert copied == place.storage.stat(f"{place.folder}/b")
    assert place.storage.read_bytes(copied.uri, limit=copied.size) == data
    assert place.unpublished() == []


def test_what_is_not_there_is_not_found(storage: Storage, folder: str) -> None:
    storage.write_bytes(f"{folder}/a/b", b"x")

    for uri in (f"{folder}/absent", f"{folder}/a"):
        assert _code(lambda uri=uri: storage.stat(uri)) == "not_found"
        assert _code(lambda uri=uri: storage.read_bytes(uri, limit=10)) == "not_found"
        assert _code(lambda uri=uri: storage.copy(uri, f"{folder}/c", version="v")) == "not_found"
    assert _code(lambda: _read(storage, f"{folder}/absent", 0, 1, "version")) == "not_found"


@pytest.mark.s3
@pytest.mark.parametrize("size", [0, 3, 20 * MIB + 3])
def test_copies_pass_between_kinds_of_storage(
    s3_env: object, bucket: str, tmp_path: Path, size: int
) -> None:
    storage = open_storage()
    data = secrets.token_bytes(size)
    original = storage.write_bytes(f"{tmp_path}/a", data)

    there = storage.copy(original.uri, f"s3://{bucket}/a", version=original.version)
    back = storage.copy(there.uri, f"{tmp_path}/b", version=there.version)

    assert storage.read_bytes(back.uri, limit=size) == data
    assert (
        _code(lambda: storage.copy(original.uri, f"s3://{bucket}/c", version="other"))
        == "source_changed"
    )
