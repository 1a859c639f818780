"""The allow-list of storage roots: addresses that a merge may read and write.

A root is a local folder or an ``s3://bucket/prefix``; what lies below it is allowed. Without roots
everything is allowed, which is right for a person's own command line and for nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from merging.errors import StorageError
from merging.storage.address import LOCAL, bad_uri, scheme_of


class Roots:
    """Checks addresses against the roots.

    Both sides are compared as ``resolve`` gives them: normalised, and for local paths with every
    symbolic link followed, so that a link inside a root cannot lead out of it.

    Args:
        roots: The administrator's list; empty allows everything.
        resolve: Turns a well-formed address into the one that it finally stands for.
    """

    def __init__(self, roots: Sequence[str], resolve: Callable[[str], str]) -> None:
        self._resolve = resolve
        self._roots = tuple(resolve(root) for root in roots)

    def check(self, uri: str) -> None:
        """Refuse an address outside every root.

        Raises:
            StorageError: ``bad_uri`` if it steps upwards with ``..``, ``uri_not_allowed`` if it is
                outside the roots. The message does not list the roots: they say how the
                administrator's storage is laid out.
        """
        if not self._roots:
            return
        if scheme_of(uri) == LOCAL and ".." in re.split(r"[/\\]", uri):
            raise bad_uri(uri, "'..' is not allowed; write the path without it.")
        if not self.contains(uri):
            raise StorageError(
                f"{uri!r} is outside the storage that this service may use. The administrator "
                "lists the allowed prefixes with --storage-root.",
                code="uri_not_allowed",
                context={"uri": uri},
            )

    def contains(self, uri: str) -> bool:
        """Whether an address is one of the roots or below one; always, if there are no roots."""
        if not self._roots:
            return True
        target = self._resolve(uri)
        return any(target == root or target.startswith(_folder(root)) for root in self._roots)

    def has(self, uri: str) -> bool:
        """Whether an address is itself one of the roots."""
        return self._resolve(uri) in self._roots


def _folder(root: str) -> str:
    # The slash keeps s3://bucket/models from allowing s3://bucket/models-of-others.
    return root if root.endswith("/") else root + "/"
