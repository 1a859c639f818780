"""What every run of a shard is given, whom it tells of progress, and the receipt it leaves."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from merging.errors import Cancelled
from merging.plan.plan import ShardWork
from merging.rates import Rates
from merging.receipts import ProblemFigures, Receipt
from merging.storage.base import ObjectStat, Storage

StageNote = Callable[[str, float], None]
"""``note(stage, seconds)``, at the end of each stretch of a stage, also of one that failed."""


@dataclass(frozen=True, slots=True)
class ShardCounts:
    """How far a shard is; problems pass the stages in file order, so counts say which."""

    tensors_fetched: int
    tensors_solved: int
    tensors_written: int
    bytes_read: int
    bytes_written: int


@dataclass(slots=True)
class ShardRun:
    """One run of a shard.

    Attributes:
        work: The plan of the shard.
        storage: Where sources are and the output goes.
        device: Torch device that solves.
        on_progress: Called after every piece of work.
        cancelled: Asked before every piece of work.
        rates: What is known of this machine's speed.
        on_stage: Told of each stretch that is accounted to a stage.
        bytes_read: From sources, so far.
        read_requests: That took.
        seconds: Wall time by stage, as the solving thread sees it: waiting for bytes is ``fetch``.
        began: When the run began, on the clock of ``seconds``.
    """

    work: ShardWork
    storage: Storage
    device: str
    on_progress: Callable[[ShardCounts], None] | None
    cancelled: Callable[[], bool] | None
    rates: Rates | None
    on_stage: StageNote | None = None
    bytes_read: int = 0
    read_requests: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"fetch": 0.0, "solve": 0.0, "write": 0.0}
    )
    began: float = field(default_factory=time.perf_counter)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Account the time to a stage, but for what is accounted to another one meanwhile."""
        begin = time.perf_counter() - sum(self.seconds.values())
        try:
            yield
        finally:
            seconds = time.perf_counter() - sum(self.seconds.values()) - begin
            self.seconds[stage] += seconds
            if self.on_stage is not None:
                self.on_stage(stage, seconds)

    def check_cancelled(self) -> None:
        """Stop if nobody wants the result any more.

        Raises:
            Cancelled: ``cancelled`` said so.
        """
        if self.cancelled is not None and self.cancelled():
            raise Cancelled("The merge was cancelled.")

    def tell(self, num_done: int, bytes_written: int) -> None:
        """Tell of progress where tensors pass all stages at once."""
        if self.on_progress is not None:
            counts = ShardCounts(num_done, num_done, num_done, self.bytes_read, bytes_written)
            self.on_progress(counts)

    def receipt(
        self, stat: ObjectStat, sha256: str, problems: tuple[ProblemFigures, ...], peak_bytes: int
    ) -> Receipt:
        """The receipt of a shard that is published, with what is known of the run by now.

        Args:
            stat: Of the file.
            sha256: Hex digest of it.
            problems: Figures per tensor, in file order.
            peak_bytes: Most host bytes held in tensor buffers at once.
        """
        shard = self.work.shard
        return Receipt(
            plan_digest=self.work.plan_digest,
            shard_index=shard.index,
            file_name=shard.file_name,
            size=stat.size,
            sha256=sha256,
            version=stat.version,
            bytes_read=self.bytes_read,
            read_requests=self.read_requests,
            peak_buffer_bytes=peak_bytes,
            seconds=self.seconds | {"total": time.perf_counter() - self.began},
            device=describe_device(self.device),
            worker=f"{platform.node()}:{os.getpid()}",
            problems=problems,
            rates=self.rates,
        )


def describe_device(device: str) -> str:
    """A device as people know it: ``cpu``, or ``cuda:0 NVIDIA H100``."""
    if device == "cpu":
        return "cpu"
    import torch

    return f"{device} {torch.cuda.get_device_name(device)}"
