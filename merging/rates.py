"""How fast a machine works: kept in a file, and used to estimate what a merge will take.

What a device computes is measured once (:mod:`merging.probe`). How fast bytes come and go is
measured on a small file at first, and learned from the merges that are done: each kind of storage
has its own rate, and one that was never used has none.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec

_LEARN_BYTES = 4 << 20
"""Fewer bytes say more about latency than about speed."""

_KEPT = 32
"""Machines and devices that a book remembers."""


class Rates(msgspec.Struct, frozen=True):
    """What one device of one machine does in a second.

    Attributes:
        machine: Name of the machine.
        device: As in receipts (``cpu``, ``cuda:0 NVIDIA …``).
        threads: Torch threads that it was measured with.
        steps: Flop/s of a solver's step (a product of n×n matrices and passes over the result), as
            pairs of n and the rate, n ascending.
        operations: Operations on single entries, as methods do them block by block.
        entries: Entries of tensors checked on their way in, or rounded and checked on their way
            out.
        read: Bytes read, by kind of storage (``file``, ``s3``).
        written: Bytes hashed and written, likewise.
    """

    machine: str
    device: str
    threads: int
    steps: tuple[tuple[int, float], ...]
    operations: float
    entries: float
    read: dict[str, float] = {}
    written: dict[str, float] = {}

    def flops_per_second(self, rows: int, columns: int) -> float:
        """The rate of steps on rows×columns, as of the square matrix with as many operations."""
        size = math.log(max(rows, 1)) / 3 + math.log(max(columns, 1)) * 2 / 3
        points = [(math.log(measured), math.log(rate)) for measured, rate in self.steps]
        for (left, low), (right, high) in itertools.pairwise(points):
            if size <= right:
                share = max(0.0, (size - left) / (right - left))
                return math.exp(low + share * (high - low))
        return self.steps[-1][1]

    def learn(self, read: Mapping[str, Transfer], written: Mapping[str, Transfer]) -> Rates:
        """The rates with what a shard's transfers tell, by kind of storage."""
        return msgspec.structs.replace(
            self, read=_learn(self.read, read), written=_learn(self.written, written)
        )


class Transfer(msgspec.Struct, frozen=True):
    """Bytes moved, and the seconds in which some of them were moving."""

    num_bytes: int
    seconds: float


def storage_kind(uri: str) -> str:
    """Kind of storage of an address, such as ``s3`` or ``file``."""
    return uri.partition("://")[0] if "://" in uri else "file"


def _learn(known: Mapping[str, float], seen: Mapping[str, Transfer]) -> dict[str, float]:
    """Half old, half new on a scale of powers: one odd shard does not spoil a rate."""
    rates = dict(known)
    for kind, transfer in seen.items():
        if transfer.num_bytes >= _LEARN_BYTES and transfer.seconds > 0:
            found = transfer.num_bytes / transfer.seconds
            rates[kind] = math.sqrt(rates[kind] * found) if kind in rates else found
    return rates


class RateBook:
    """Rates that were seen, the last ones of each device, kept in a JSON file.

    A file that cannot be read or written is no fault: rates can be measured again. May be used
    from several threads.

    Args:
        path: The file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._rates: list[Rates] = []
        self._load()

    def note(self, rates: Rates) -> None:
        """Remember rates in place of earlier ones of the same device."""
        with self._lock:
            self._load()  # what other processes noted meanwhile
            others = [known for known in self._rates if _key(known) != _key(rates)]
            self._rates = [*others, rates][-_KEPT:]
            with contextlib.suppress(OSError):
                self._save()

    def find(
        self, *, machine: str | None = None, device: str | None = None, threads: int | None = None
    ) -> Rates | None:
        """The rates noted last of what is asked for, if there are any.

        Args:
            machine: Its name; None for any.
            device: What the device's name begins with, as in ``cuda``; None for any.
            threads: Torch threads; None for any.
        """
        for rates in reversed(self._rates):
            if (
                machine in (None, rates.machine)
                and rates.device.startswith(device or "")
                and threads in (None, rates.threads)
            ):
                return rates
        return None

    def _load(self) -> None:
        if self._path is not None:
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                self._rates = msgspec.json.decode(self._path.read_bytes(), type=list[Rates])

    def _save(self) -> None:
        if self._path is None:
            return
        data = msgspec.json.format(msgspec.json.encode(self._rates))
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._path.parent, delete=False) as file:
            try:
                file.write(data)
                file.close()
                Path(file.name).replace(self._path)
            except OSError:
                Path(file.name).unlink(missing_ok=True)


def _key(rates: Rates) -> tuple[str, str, int]:
    return (rates.machine, rates.device, rates.threads)
