"""The engine as pools run it: a worker that knows how fast its machine is, and says so.

What is known of the machine goes into every receipt, so that a merge report can set what was
expected beside what came, and the controller can say how long the next merge will take.
"""

from __future__ import annotations

import functools
import os
import platform
import threading
from collections.abc import Callable
from pathlib import Path

from merging.execute.shard import run_shard as run_plain_shard
from merging.execute.shard_run import ShardCounts, StageNote, describe_device
from merging.plan.plan import ShardWork
from merging.probe import measure_rates
from merging.rates import RateBook, Rates, Transfer, storage_kind
from merging.receipts import Receipt
from merging.storage.base import Storage


def run_shard(
    work: ShardWork,
    storage: Storage,
    *,
    device: str = "cpu",
    on_progress: Callable[[ShardCounts], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    on_stage: StageNote | None = None,
) -> Receipt:
    """:func:`merging.execute.shard.run_shard` with rates in the receipt.

    The first shard on a machine and device measures them, which takes about half a second.
    """
    machine = _machine()
    rates = machine.rates(device, work.threads)
    receipt = run_plain_shard(
        work,
        storage,
        device=device,
        on_progress=on_progress,
        cancelled=cancelled,
        rates=rates,
        on_stage=on_stage,
    )
    machine.book.note(learn(rates, work, receipt))
    return receipt


def learn(rates: Rates, work: ShardWork, receipt: Receipt) -> Rates:
    """The rates with what a shard's reading and writing tells."""
    busy = receipt.busy_seconds
    kinds = {storage_kind(file.uri) for file in work.files}
    read = {}
    if len(kinds) == 1:  # of several kinds nobody knows which took how long
        read[kinds.pop()] = Transfer(receipt.bytes_read, busy.get("read", 0.0))
    written = {
        storage_kind(work.output_uri): Transfer(receipt.bytes_written, busy.get("write", 0.0))
    }
    return rates.learn(read, written)


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/mergeyard``, by default ``~/.cache/mergeyard``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mergeyard"


class _Machine:
    """What this process knows of its machine's speed."""

    def __init__(self) -> None:
        self.book = RateBook(cache_folder() / "rates.json")
        self._measuring = threading.Lock()

    def rates(self, device: str, threads: int) -> Rates:
        """Rates of a device: as remembered, or else measured now, by one thread at a time."""
        name = describe_device(device)
        with self._measuring:
            rates = self.book.find(machine=platform.node(), device=name, threads=threads)
            if rates is None:
                rates = measure_rates(device, name, threads, cache_folder())
                self.book.note(rates)
        return rates


@functools.cache
def _machine() -> _Machine:
    """One per process."""
    return _Machine()
