"""Blocking work beside the runner's loop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from merging.errors import MergeError
from service.jobs.errors import StoreError
from service.runner.context import RunnerContext

Result = TypeVar("Result")


class Background(Generic[Result]):
    """A function that runs in a thread, again after a while if it failed and that may help.

    Args:
        function: Gives something that is not None.
        context: Threads, and how often and when to try again.
    """

    def __init__(self, function: Callable[[], Result], context: RunnerContext) -> None:
        self._function = function
        self._context = context
        self._future: Future[Result] | None = None
        self._failures = 0
        self._start_at = float("-inf")

    @property
    def is_running(self) -> bool:
        """A thread is at it."""
        return self._future is not None and not self._future.done()

    @property
    def result(self) -> Result | None:
        """What it gave, once it is done and went well."""
        if self._future is None or self.is_running or self._future.exception() is not None:
            return None
        return self._future.result()

    def poll(self) -> Result | None:
        """Start it if need be, and look how it is going; its result, from when there is one.

        Raises:
            MergeError: It failed, and trying again will not help.
            StoreError: The store was away; the next call starts it again.
        """
        if self._future is None:
            if self._context.monotonic() >= self._start_at:
                self._future = self._context.threads.submit(self._function)
            return None
        if not self._future.done():
            return None
        error = self._future.exception()
        if error is None:
            return self._future.result()
        self._future = None
        if isinstance(error, MergeError) and not isinstance(error, StoreError):
            self._failures += 1
            start_at = self._context.retry_of(error, self._failures)
            if start_at is not None:
                self._start_at = start_at
                return None
        raise error
