"""Files that appear whole or not at all: written under a hidden name, then renamed.

A process that is killed leaves its hidden file behind. Every live one is locked, so the next write
in the same folder can tell which are orphans, and removes those.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from pathlib import Path

_TEMPORARY = re.compile(r"\.mergeyard-[0-9a-f]{16}\.tmp")
_CREATE_ATTEMPTS = 5  # one is enough unless others prune or reap the same folder just then


def is_temporary(name: str) -> bool:
    """Whether a file name is one of our unfinished files."""
    return _TEMPORARY.fullmatch(name) is not None


class AtomicFile:
    """An unfinished file beside its target; parents are created.

    Its mode is that of any new file (0666 less the umask), as the kernel sets it at creation.

    Args:
        target: Absolute path of the file to be.

    Raises:
        OSError: From here and every method; the caller knows the address and words the error.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_orphans(target.parent)
        self._path, self.fd = _create_locked(target.parent)

    def write(self, data: memoryview) -> None:
        """Append bytes."""
        while data:
            data = data[os.write(self.fd, data) :]

    def publish(self, *, replace: bool = True) -> os.stat_result:
        """Make the file durable and visible under its own name.

        Args:
            replace: Whether a file that is already there gives way; else ``FileExistsError``.
        """
        os.fsync(self.fd)
        if replace:
            self._path.replace(self._target)
        else:
            self._target.hardlink_to(self._path)
            self._path.unlink()
        _fsync_folder(self._target.parent)
        status = os.fstat(self.fd)
        os.close(self.fd)
        return status

    def discard(self) -> None:
        """Remove the unfinished file; not to be called after :meth:`publish` returned."""
        try:
            self._path.unlink(missing_ok=True)
        finally:
            os.close(self.fd)


def _create_locked(folder: Path) -> tuple[Path, int]:
    """Create a hidden file that this process has locked; returns its path and descriptor."""
    for _ in range(_CREATE_ATTEMPTS):
        path = folder / f".mergeyard-{secrets.token_hex(8)}.tmp"
        try:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # another writer pruned the empty folder
            folder.mkdir(parents=True, exist_ok=True)
            continue
        with contextlib.suppress(OSError):  # a file system without locks: its orphans stay
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)  # taken for an orphan between creation and lock
    raise FileNotFoundError(2, "the folder keeps disappearing", str(folder))


def remove_orphans(
    folder: Path, *, since: float = float("-inf"), until: float = float("inf")
) -> int:
    """Remove unfinished files whose writers are gone; returns how many.

    Args:
        folder: Where they are.
        since: Only those that were last written to after this (seconds since 1970).
        until: And before this.
    """
    with os.scandir(folder) as entries:
        paths = [entry.path for entry in entries if is_temporary(entry.name)]
    removed = 0
    for path in paths:
        with contextlib.suppress(OSError):  # locked, or published or removed meanwhile
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if since <= os.fstat(fd).st_mtime <= until:
                    Path(path).unlink()
                    removed += 1
            finally:
                os.close(fd)
    return removed


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
