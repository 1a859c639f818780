"""Writing a shard's files: each hashed and stored by a thread of its own while solving goes on."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from merging.errors import MergeError
from merging.execute.busy import BusyClock
from merging.execute.memory import MemoryBudget
from merging.storage.base import ObjectStat, Storage, Writer

if TYPE_CHECKING:
    import torch

_QUEUE_LENGTH = 2
_Waiting = tuple[memoryview | bytes, Callable[[], None]]


def _nothing() -> None:
    """Nobody waits for what was written."""


class ShardFile:
    """A streamed safetensors file whose bytes are hashed and written in the background.

    As a context manager it aborts the write unless :meth:`finish` has returned.
    """

    def __init__(self, writer: Writer, budget: MemoryBudget, busy: BusyClock) -> None:
        self._writer = writer
        self._budget = budget
        self._busy = busy
        self._hash = hashlib.sha256()
        self._queue: queue.Queue[_Waiting | None] = queue.Queue(_QUEUE_LENGTH)
        self._error: BaseException | None = None
        self.bytes_written = 0
        self.bytes_waiting = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="shard-writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._error = self._error or MergeError("The write was given up.", code="cancelled")
            self._queue.put(None)
            self._thread.join()
        self._writer.abort()

    def write(self, data: bytes | torch.Tensor, done: Callable[[], None] = _nothing) -> None:
        """Append bytes, or the raw bytes of a contiguous host tensor that nobody changes meanwhile.

        What waits to be written counts against the budget. ``done`` is called when it is written.

        Raises:
            StorageError: An earlier write failed.
        """
        if self._error is not None:
            raise self._error
        raw = data if isinstance(data, bytes) else _raw_bytes(data)
        self._budget.take(len(raw))
        with self._lock:
            self.bytes_waiting += len(raw)
        self._queue.put((raw, done))

    def finish(self) -> tuple[ObjectStat, str]:
        """Wait for all writes and publish the file; returns its stat and hex SHA-256."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        with self._busy:
            return self._writer.commit(), self._hash.hexdigest()

    def _run(self) -> None:
        while (waiting := self._queue.get()) is not None:
            data, done = waiting
            try:
                if self._error is None:
                    with self._busy:
                        self._hash.update(data)
                        self._writer.write(data)
                    self.bytes_written += len(data)
            except BaseException as error:  # noqa: BLE001 - handed to the solving thread
                self._error = error
            num_bytes = len(data)
            del data, waiting
            done()
            self._budget.release(num_bytes)
            with self._lock:  # who sees that nothing waits finds the bytes given back
                self.bytes_waiting -= num_bytes
            self._budget.wake()


class ShardFiles:
    """The files of a shard, one for each variant of a sweep; a context manager as its files are.

    Args:
        storage: Where they go.
        uris: Their addresses.
        size: Bytes of each.
        budget: What waits to be written counts against it.

    Attributes:
        busy: Tells when bytes are moving to any of them.
        buffer_bytes: Most host memory that the writers hold.
    """

    def __init__(
        self, storage: Storage, uris: Sequence[str], size: int, budget: MemoryBudget
    ) -> None:
        self.busy = BusyClock()
        self.buffer_bytes = 0
        self._files: list[ShardFile] = []
        with contextlib.ExitStack() as stack:
            for uri in uris:
                writer = stack.enter_context(storage.open_writer(uri, size))
                self.buffer_bytes += writer.buffer_bytes
                file = ShardFile(writer, budget, self.busy)
                self._files.append(stack.enter_context(file))
            self._stack = stack.pop_all()

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    @property
    def bytes_written(self) -> list[int]:
        """Of each file."""
        return [file.bytes_written for file in self._files]

    @property
    def bytes_waiting(self) -> int:
        """Of all files."""
        return sum(file.bytes_waiting for file in self._files)

    def write(
        self,
        data: bytes | torch.Tensor,
        numbers: Sequence[int] | None = None,
        done: Callable[[], None] = _nothing,
    ) -> None:
        """Append to files, by default to all; see :meth:`ShardFile.write`."""
        chosen = range(len(self._files)) if numbers is None else numbers
        left = iter(range(len(chosen) - 1, -1, -1))  # taken from by the writers' threads

        def done_once() -> None:
            if next(left) == 0:
                done()

        for number in chosen:
            self._files[number].write(data, done_once)

    def finish(self) -> list[tuple[ObjectStat, str]]:
        """Publish one file after the other; see :meth:`ShardFile.finish`."""
        return [file.finish() for file in self._files]


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    if tensor.numel() == 0:
        return memoryview(b"")
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
