"""The real engine behind a gate, so that a test sees a merge at any point of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merging.errors import Cancelled
from merging.plan.plan import ShardWork
from merging.receipts import Receipt
from merging.storage.base import Storage
from workers.measured import run_shard

ENGINE = "tests.support.gated_engine:run_behind_gate"


def open_gate(output: Path, shards: int) -> None:
    """Let the first shards of the merge into ``output`` pass."""
    fresh = _gate(str(output)).with_suffix(".new")
    fresh.write_text(str(shards))
    fresh.replace(_gate(str(output)))


def run_behind_gate(
    work: ShardWork, storage: Storage, *, cancelled: Callable[[], bool], **rest: Any
) -> Receipt:
    """Wait until the gate of the output is open for this shard, then make it."""
    gate = _gate(work.output_uri)
    while not gate.exists() or int(gate.read_text()) <= work.shard.index:
        if cancelled():
            raise Cancelled("Stopped at the gate.")
        threading.Event().wait(0.01)  # a pause in which the test opens the gate
    return run_shard(work, storage, cancelled=cancelled, **rest)


def _gate(output_uri: str) -> Path:
    return Path(output_uri.removeprefix("file://")).with_suffix(".gate")
