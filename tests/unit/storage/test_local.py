from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from merging.errors import StorageError
from merging.storage.local import LocalStorage


@pytest.fixture
def storage() -> LocalStorage:
    return LocalStorage()


def _error(call: Callable[[], object]) -> StorageError:
    with pytest.raises(StorageError) as caught:
        call()
    return caught.value


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], indirect=True)
def test_files_have_the_mode_that_the_umask_says(
    storage: LocalStorage, tmp_path: Path, umask: int
) -> None:
    small = storage.write_bytes(f"{tmp_path}/small", b"x")
    with storage.open_writer(f"{tmp_path}/large", 1) as writer:
        writer.write(b"x")
        writer.commit()
    storage.copy(small.uri, f"{tmp_path}/copy", version=small.version)

    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b"longer than before"),
        lambda path: os.utime(path, ns=(1, 1)),
        lambda path: path.with_name("new").rename(path),
    ],
    ids=["length", "time", "inode"],
)
def test_a_version_changes_with_length_time_and_inode(
    storage: LocalStorage, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")
    path.with_name("new").write_bytes(b"before")
    os.utime(path.with_name("new"), ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    version = storage.stat(str(path)).version

    change(path)

    error = _error(
        lambda: storage.read_into(str(path), 0, memoryview(bytearray(1)), version=version)
    )
    assert error.code == "source_changed"


def test_a_change_during_the_read_is_seen(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")
    version = storage.stat(str(path)).version
    read = os.preadv

    def read_while_it_is_rewritten(fd: int, buffers: list[memoryview], offset: int) -> int:
        path.write_bytes(b"AFTER!!")
        return read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read_while_it_is_rewritten)

    error = _error(
        lambda: storage.read_into(str(path), 0, memoryview(bytearray(6)), version=version)
    )
    assert error.code == "source_changed"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system takes privileges that are missing here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_reported_and_what_was_written_goes(
    storage: LocalStorage, tiny_disk: Path
) -> None:
    def fill() -> None:
        with storage.open_writer(f"{tiny_disk}/a", 4 << 20) as writer:
            writer.write(bytes(4 << 20))
            writer.commit()

    error = _error(fill)

    assert (error.code, error.retryable) == ("no_space", False)
    assert f"{tiny_disk}/a" in error.detail
    assert list(tiny_disk.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "code", "retryable"),
    [
        (errno.ENOSPC, "no_space", False),
        (errno.EDQUOT, "no_space", False),
        (errno.EROFS, "denied", False),
        (errno.EACCES, "denied", False),
        (errno.EIO, "unavailable", True),
        (errno.ESTALE, "unavailable", True),
    ],
)
def test_errors_of_the_system_get_their_codes(
    storage: LocalStorage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: str,
    retryable: bool,
) -> None:
    # Stands in for full, read-only and failing disks, which cannot be had everywhere.
    def fail(fd: int, data: memoryview) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", fail)

    error = _error(lambda: storage.write_bytes(f"{tmp_path}/a", b"x"))

    assert (error.code, error.retryable) == (code, retryable)
    assert f"{tmp_path}/a" in error.detail
    assert list(tmp_path.iterdir()) == []


def test_writing_below_a_file_is_denied(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    for uri in (f"{tmp_path}/file/a", f"{tmp_path}/file/deep/a"):
        error = _error(lambda uri=uri: storage.write_bytes(uri, b"x"))
        assert error.code == "denied"
        assert "a part of the path is a file" in error.detail


def test_writing_over_a_folder_is_denied_and_leaves_nothing(
    storage: LocalStorage, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()

    assert _error(lambda: storage.write_bytes(f"{tmp_path}/folder", b"x")).code == "denied"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_neither_folders_nor_pipes_are_read(storage: LocalStorage, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    for uri in (str(tmp_path), f"{tmp_path}/pipe"):
        assert _error(lambda uri=uri: storage.stat(uri)).code == "not_found"
        assert _error(lambda uri=uri: storage.read_bytes(uri, limit=1)).code == "not_found"
    assert storage.list(str(tmp_path)) == []


def test_a_circle_of_links_is_an_error_and_not_a_hang(
    storage: LocalStorage, tmp_path: Path
) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "up").symlink_to(tmp_path)

    assert _error(lambda: storage.stat(f"{tmp_path}/a")).code == "denied"
    assert storage.list(str(tmp_path)) == []


_DIE_WHILE_WRITING = """
import os, sys
from merging.storage.local import LocalStorage
writer = LocalStorage().open_writer(sys.argv[1], 100)
writer.write(bytes(50))
os._exit(9)
"""


def test_the_next_write_removes_what_a_killed_writer_left(
    storage: LocalStorage, tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-c", _DIE_WHILE_WRITING, f"{tmp_path}/a"], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    assert storage.list(str(tmp_path)) == []

    storage.write_bytes(f"{tmp_path}/b", b"x")

    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_write_spares_what_others_are_writing(storage: LocalStorage, tmp_path: Path) -> None:
    with storage.open_writer(f"{tmp_path}/a", 3) as writer:
        writer.write(b"abc")
        storage.write_bytes(f"{tmp_path}/b", b"x")
        writer.commit()

    assert storage.read_bytes(f"{tmp_path}/a", limit=3) == b"abc"


def test_two_writers_of_one_file_both_succeed_and_the_last_one_stays(
    storage: LocalStorage, tmp_path: Path
) -> None:
    with storage.open_writer(f"{tmp_path}/a", 1) as first:
        first.write(b"1")
        with storage.open_writer(f"{tmp_path}/a", 1) as second:
            second.write(b"2")
            second.commit()
        last = first.commit()

    assert storage.stat(f"{tmp_path}/a") == last
    assert storage.read_bytes(f"{tmp_path}/a", limit=1) == b"1"


def test_deleting_prunes_empty_folders_of_the_workspace_only(
    storage: LocalStorage, tmp_path: Path
) -> None:
    receipt = f"{tmp_path}/output/.mergeyard/0123/a.json"
    storage.write_bytes(receipt, b"x")
    storage.write_bytes(f"{tmp_path}/other/b", b"x")

    storage.delete(receipt)
    storage.delete(f"{tmp_path}/other/b")

    assert sorted(path.name for path in tmp_path.rglob("*")) == ["other", "output"]


def test_a_copy_falls_back_where_the_kernel_cannot(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stands in for a copy between file systems that do not know each other.
    def refuse(*args: object, **kwargs: object) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    original = storage.write_bytes(f"{tmp_path}/a", bytes(range(256)) * 5000)

    copied = storage.copy(original.uri, f"{tmp_path}/b", version=original.version)

    assert storage.read_bytes(copied.uri, limit=copied.size) == bytes(range(256)) * 5000
