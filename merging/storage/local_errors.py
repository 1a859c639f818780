"""What the operating system's errors mean, in this project's few codes."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from merging.errors import StorageError
from merging.storage import faults

_DENIED = {
    errno.EACCES: "permission denied",
    errno.EPERM: "the file system does not permit it",
    errno.EROFS: "the file system is mounted read-only",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.ENAMETOOLONG: "the name is too long for the file system",
    errno.EOPNOTSUPP: "the file system does not support it",
}
_NO_SPACE = {
    errno.ENOSPC: "no space is left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "it is larger than the file system or the limit on file sizes allows",
}
_ADVICE = {
    "denied": " Choose another path, or change the folder's permissions.",
    "no_space": " Free some, or choose another place.",
}


@contextlib.contextmanager
def worded(path: str, verb: str) -> Iterator[None]:
    """Turn an error of the operating system into one that says what to do."""
    try:
        yield
    except OSError as error:
        is_missing = error.errno == errno.ENOENT
        if is_missing or (verb == "read" and error.errno == errno.ENOTDIR):
            raise faults.not_found(path, "there is no such file") from error
        code, reason, retryable = _sort_error(error)
        raise StorageError(
            f"Cannot {verb} {path}: {reason}.{_ADVICE.get(code, '')}",
            code=code,
            retryable=retryable,
            context={"uri": path, "errno": errno.errorcode.get(error.errno or 0)},
        ) from error


def _sort_error(error: OSError) -> tuple[str, str, bool]:
    """Code, reason and whether it may pass of an operating system's error."""
    number = error.errno or 0
    if number in _DENIED:
        return "denied", _DENIED[number], False
    if number in _NO_SPACE:
        return "no_space", _NO_SPACE[number], False
    return "unavailable", os.strerror(number), True
