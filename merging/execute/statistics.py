"""One shard of statistics: a block of an expert is run on its samples, and what goes in measured.

What an earlier merge has kept of the same is taken over instead, if it is whole.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from merging.dtypes import torch_dtype
from merging.errors import Cancelled, NumericalError
from merging.execute.block_runner import BlockRunner
from merging.execute.fisher import FisherRun
from merging.execute.memory import MemoryBudget
from merging.execute.output import ShardFiles
from merging.execute.shard import ShardCounts, device_name
from merging.execute.skeleton import Skeleton
from merging.execute.tokens import PADDING, check_images, read_tokens
from merging.kept import find_kept, write_record
from merging.ops.precision import float32_products
from merging.plan.packing import shard_header
from merging.plan.plan import STATISTICS, ShardWork, Source
from merging.plan.statistics_work import StatisticsWork
from merging.rates import Rates
from merging.receipts import ProblemFigures, Receipt, write_receipt
from merging.storage.base import Storage


def run_statistics(
    work: ShardWork,
    storage: Storage,
    device: str,
    on_progress: Callable[[ShardCounts], None] | None,
    cancelled: Callable[[], bool] | None,
    rates: Rates | None,
) -> Receipt:
    """Produce and publish one shard of statistics; as :func:`merging.execute.shard.run_shard`.

    Raises:
        CheckpointError: The model cannot be run block by block.
        RecipeError: Samples that its tokenizer makes nothing of.
        NumericalError: Hidden states or statistics are not finite.
    """
    return _StatisticsRun(work, storage, device, on_progress, cancelled, rates).run()


class _StatisticsRun:
    """The state of one call of :func:`run_statistics`."""

    def __init__(
        self,
        work: ShardWork,
        storage: Storage,
        device: str,
        on_progress: Callable[[ShardCounts], None] | None,
        cancelled: Callable[[], bool] | None,
        rates: Rates | None,
    ) -> None:
        self._shard = work
        [setting] = work.settings
        self._work = msgspec.convert(setting.parameters, StatisticsWork)
        self._storage = storage
        self._device = device
        self._on_progress = on_progress
        self._cancelled = cancelled
        self._rates = rates
        self._given = iter(work.shard.problems[0].given)
        self._bytes_read = 0
        self._requests = 0
        self._seconds = {"fetch": 0.0, "solve": 0.0, "write": 0.0}

    def run(self) -> Receipt:
        """The receipt of what is measured, or was by an earlier merge; either is looked for twice,
        since another merge may be measuring the same right now.
        """
        begin = time.perf_counter()
        found = self._find_kept(begin)
        if found is None:
            results, num_tokens = self._measure()
            found = self._find_kept(begin) or self._write(results, begin, num_tokens)
        write_receipt(self._storage, self._shard.output_uri, found)
        self._report(len(self._shard.shard.problems), self._shard.shard.size)
        return found

    def _find_kept(self, begin: float) -> Receipt | None:
        """A receipt for what is kept of an earlier merge, if it is whole."""
        shard, reading = self._shard.shard, time.perf_counter()
        if not shard.folder:
            return None
        [uri] = self._shard.file_uris
        record = find_kept(self._storage, uri)
        if record is None:
            return None
        self._bytes_read += record.size
        self._requests += 1
        self._seconds["fetch"] += time.perf_counter() - reading
        return msgspec.structs.replace(
            record,
            plan_digest=self._shard.plan_digest,
            shard_index=shard.index,
            bytes_read=self._bytes_read,
            read_requests=self._requests,
            peak_buffer_bytes=shard.problems[0].host_bytes if self._seconds["solve"] else 0,
            seconds=self._seconds | {"total": time.perf_counter() - begin},
            device=device_name(self._device),
            worker=_worker_name(),
            rates=self._rates,
            reused=True,
        )

    def _measure(self) -> tuple[list[torch.Tensor], int]:
        """Results in the order of the shard's problems, and the number of tokens."""
        work = self._work
        if work.backward is not None:
            return self._go_back()
        images = torch.zeros(0)
        if work.block < 0 and work.image_shape:
            hidden = torch.zeros(0)
            images = check_images(work, self._read())
            tokens = torch.zeros(work.num_samples, work.length, dtype=torch.int32)
        elif work.block < 0:
            hidden = torch.zeros(0)
            num_files = len(self._shard.shard.problems[0].given) - len(work.weights)
            tokens = read_tokens(work, [self._read().numpy().tobytes() for _ in range(num_files)])
        else:
            tokens = self._read().view(work.num_samples, work.length)
            hidden = self._read().view(work.num_samples, work.length, -1)
        skeleton = Skeleton(work, self._device)
        for weight in work.weights:
            skeleton.load(weight.name, self._read().view(weight.shape))
        skeleton.check_block()
        solving = time.perf_counter()
        runner = BlockRunner(skeleton, work, self._device)
        with float32_products(torch.device(self._device)), torch.no_grad():
            left = runner.run(tokens, hidden, images, self._check_cancelled)
            results = self._results(tokens, left, runner)
        self._seconds["solve"] = time.perf_counter() - solving
        return results, int((tokens != PADDING).sum())

    def _go_back(self) -> tuple[list[torch.Tensor], int]:
        fisher = FisherRun(self._work, self._read, self._device)
        solving = time.perf_counter()
        results = fisher.run(self._check_cancelled)
        self._check_finite(results)
        self._seconds["solve"] = time.perf_counter() - solving
        return results, fisher.num_tokens

    def _read(self) -> torch.Tensor:
        """The next of what the shard is given, flat."""
        begin = time.perf_counter()
        source: Source = next(self._given)
        file = self._shard.files[source.file]
        data = torch.empty(source.num_bytes, dtype=torch.uint8)
        if source.num_bytes:
            buffer = data.numpy().data
            self._storage.read_into(file.uri, source.start, buffer, version=file.version)
        self._bytes_read += source.num_bytes
        self._requests += 1
        self._seconds["fetch"] += time.perf_counter() - begin
        return data.view(torch_dtype(source.dtype))

    def _check_cancelled(self) -> None:
        if self._cancelled is not None and self._cancelled():
            raise Cancelled("The merge was cancelled.")
        self._report(0, 0)

    def _results(
        self, tokens: torch.Tensor, left: torch.Tensor | None, runner: BlockRunner
    ) -> list[torch.Tensor]:
        results = []
        if left is not None:
            results = [tokens, left] if self._work.block < 0 else [left]
        results += [meter.result().cpu() for meter in runner.meters]
        self._check_finite(results)
        return results

    def _check_finite(self, results: list[torch.Tensor]) -> None:
        for problem, result in zip(self._shard.shard.problems, results, strict=True):
            if result.is_floating_point() and not _is_finite(result):
                raise NumericalError(
                    f"{problem.tensor_name!r} of {self._work.uri} on its samples, in block"
                    f" {self._work.block}, is not finite: its weights are too large for float32, or"
                    " a tensor that is used there has a name that tells of another place.",
                    code="non_finite_output",
                    context={"tensor_name": problem.tensor_name, "uri": self._work.uri},
                )

    def _write(self, results: list[torch.Tensor], begin: float, num_tokens: int) -> Receipt:
        shard, writing = self._shard.shard, time.perf_counter()
        budget = MemoryBudget(self._shard.memory_budget)
        with ShardFiles(self._storage, self._shard.file_uris, shard.size, budget) as files:
            files.write(shard_header(shard.problems))
            for problem, result in zip(shard.problems, results, strict=True):
                assert result.numel() == problem.num_entries
                files.write(result)
            [(stat, sha256)] = files.finish()
        self._seconds["write"] = time.perf_counter() - writing
        receipt = Receipt(
            plan_digest=self._shard.plan_digest,
            shard_index=shard.index,
            file_name=shard.file_name,
            size=stat.size,
            sha256=sha256,
            version=stat.version,
            bytes_read=self._bytes_read,
            read_requests=self._requests,
            peak_buffer_bytes=shard.problems[0].host_bytes,
            seconds=self._seconds | {"total": time.perf_counter() - begin},
            device=device_name(self._device),
            worker=_worker_name(),
            problems=self._figures(num_tokens),
            rates=self._rates,
        )
        if shard.folder:
            write_record(self._storage, stat.uri, receipt)
        return receipt

    def _figures(self, num_tokens: int) -> tuple[ProblemFigures, ...]:
        """Of every result; provenance with the first."""
        work = self._work
        told: dict[str, Any] = {
            "model": work.uri,
            "block": work.block,
            "samples": work.num_samples,
            "tokens": num_tokens,
            "sample_digest": work.sample_digest,
        }
        return tuple(
            ProblemFigures(
                tensor_name=problem.tensor_name,
                method=STATISTICS,
                solve_seconds=0.0 if number else round(self._seconds["solve"], 6),
                figures={} if number else told,
            )
            for number, problem in enumerate(self._shard.shard.problems)
        )

    def _report(self, num_done: int, bytes_written: int) -> None:
        if self._on_progress is not None:
            counts = ShardCounts(num_done, num_done, num_done, self._bytes_read, bytes_written)
            self._on_progress(counts)


def _is_finite(tensor: torch.Tensor) -> bool:
    return all(bool(torch.isfinite(e)) for e in torch.aminmax(tensor)) if tensor.numel() else True


def _worker_name() -> str:
    return f"{platform.node()}:{os.getpid()}"
