"""The memory of one worker: a budget in bytes, and host buffers that are used again."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_GRAIN = 1 << 16
_KEPT_BYTES = 256 << 20
_AHEAD_BYTES = 256 << 20
"""Read before the solver needs it, or the next group if that is more: enough to keep eight reads
of 16 MiB going. Beyond that nothing is gained, and fresh pages cost more than reading into them."""

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_MAPPED_BYTES = 2 << 20


@functools.cache
def give_back_freed_memory() -> None:
    """Make freed tensors leave the process, on Linux with glibc; elsewhere nothing happens.

    By default glibc keeps freed blocks of up to 32 MiB for later, and a process stays hundreds of
    megabytes larger than what it uses. Blocks of 2 MiB and more are mapped and unmapped instead;
    huge pages make that as cheap (torch asks for them if this variable is set when it first
    allocates). Measured on a TIES merge of four 0.5 GB models with a budget of 256 MiB: peak 516 MB
    instead of 738, at the same processor time. Smaller blocks stay, up to a few of them: what is
    made and freed for each block of a tensor would otherwise be new pages every time. They stay in
    one arena for all threads, if no other was made yet: called before a process starts threads, it
    keeps what a merge with a budget of 48 MiB adds to it at 58 to 63 MB instead of 66 to 82.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, 8 * _MAPPED_BYTES)
        libc.mallopt(_M_ARENA_MAX, 1)


class MemoryBudget:
    """Counts bytes held against a limit.

    Prefetching waits for room beside what was set aside for solving and writing. What the solver
    needs next is admitted whatever is held, since the plan has checked that it fits and waiting
    for it would never end.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._set_aside = 0
        self._ahead = 0
        self._most_ahead = _AHEAD_BYTES
        self.used = 0
        self.peak = 0
        self._closed = False
        self._changed = threading.Condition()

    def set_aside(self, num_bytes: int) -> None:
        """Leave so many bytes of the limit to others than prefetching."""
        self._set_aside += num_bytes

    def allow_ahead(self, num_bytes: int) -> None:
        """Let prefetching be so far ahead of the solver, if that is more than it may be anyway."""
        self._most_ahead = max(self._most_ahead, num_bytes)

    def take(self, num_bytes: int) -> None:
        """Count bytes as held, whatever the limit."""
        with self._changed:
            self._add(num_bytes)

    def wait_and_take(self, num_bytes: int, *, urgent: threading.Event) -> bool:
        """Wait for room (or until ``urgent`` is set); False if the budget was closed instead.

        What was taken counts as prefetched until :meth:`arrive` says that the solver is there.
        """
        with self._changed:
            while not (self._closed or urgent.is_set() or self._has_room(num_bytes)):
                self._changed.wait()
            if self._closed:
                return False
            self._add(num_bytes)
            self._ahead += num_bytes
            return True

    def arrive(self, num_bytes: int) -> None:
        """The solver has come to bytes that were prefetched."""
        with self._changed:
            self._ahead -= num_bytes
            self._changed.notify_all()

    def _has_room(self, num_bytes: int) -> bool:
        is_near = self._ahead + num_bytes <= self._most_ahead
        return is_near and self.used + num_bytes <= self.limit - self._set_aside

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on what is held comes true; looked at after every release."""
        with self._changed:
            while not condition():
                self._changed.wait()

    def release(self, num_bytes: int) -> None:
        """Give bytes back."""
        with self._changed:
            self.used -= num_bytes
            self._changed.notify_all()

    def wake(self) -> None:
        """Let waiters look again (after an ``urgent`` event was set)."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Turn away everyone who waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _add(self, num_bytes: int) -> None:
        self.used += num_bytes
        self.peak = max(self.peak, self.used)


class BufferPool:
    """Host byte buffers for what is read and what is written, reused because fresh pages are dear.

    Idle buffers are kept as far as the budget leaves room beside what is held. With ``pinned`` they
    are page-locked, so that copies to a GPU run at full speed beside its computing.
    """

    def __init__(self, budget: MemoryBudget, *, pinned: bool) -> None:
        self._budget = budget
        self._pinned = pinned
        self._idle: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def get(self, num_bytes: int) -> torch.Tensor:
        """A uint8 tensor of at least ``num_bytes`` (uninitialised), which the budget counts."""
        import torch

        with self._lock:
            fitting = [b for b in self._idle if num_bytes <= b.numel() <= 2 * num_bytes + _GRAIN]
            if fitting:
                best = min(fitting, key=lambda buffer: buffer.numel())
                self._idle = [buffer for buffer in self._idle if buffer is not best]
                return best
        self.make_room()
        rounded = max(_GRAIN, (num_bytes + _GRAIN - 1) // _GRAIN * _GRAIN)
        return torch.empty(rounded, dtype=torch.uint8, pin_memory=self._pinned)

    def put(self, buffer: torch.Tensor) -> None:
        """Hand a buffer back; nobody may use views of it any more."""
        with self._lock:
            self._idle.append(buffer)
        self.make_room()

    def make_room(self) -> None:
        """Let go of idle buffers, longest idle first, that do not fit beside what is held."""
        with self._lock:
            room = min(_KEPT_BYTES, self._budget.limit - self._budget.used)
            while self._idle and sum(buffer.numel() for buffer in self._idle) > room:
                del self._idle[0]
