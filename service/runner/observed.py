"""A job store that lets somebody look on while a runner writes to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from service.jobs.errors import StaleLeaseError
from service.jobs.store import JobStore


class ObservedStore:
    """Passes every call on; a method ``_note_<name>`` of a subclass sees what came of it.

    What happens is thus read off what is written, and no other part of the runner need know.
    """

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._store, name)
        note = getattr(type(self), f"_note_{name}", None)

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                result = method(*args, **kwargs)
            except StaleLeaseError:
                self._note_stale(*args)
                raise
            if note is not None:
                note(self, result, *args, **kwargs)
            return result

        return call

    def _note_stale(self, *args: Any) -> None:
        """A write was refused."""
