"""One shard of statistics: a block of an expert is run on its samples, and what goes in measured.

What an earlier merge has kept of the same is taken over instead, if it is whole.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch

from merging.dtypes import torch_dtype
from merging.errors import NumericalError
from merging.execute.block_runner import BlockRunner
from merging.execute.fisher import FisherRun
from merging.execute.memory import MemoryBudget
from merging.execute.output import ShardFiles
from merging.execute.shard_run import ShardRun
from merging.execute.skeleton import Skeleton
from merging.execute.tokens import PADDING, check_images, read_tokens
from merging.kept import find_kept, write_record
from merging.ops.precision import float32_products
from merging.plan.packing import shard_header
from merging.plan.plan import STATISTICS, Source
from merging.plan.statistics_work import StatisticsWork
from merging.receipts import ProblemFigures, Receipt, write_receipt
from merging.storage.base import ObjectStat


def run_statistics(run: ShardRun) -> Receipt:
    """Produce and publish one shard of statistics; as :func:`merging.execute.shard.run_shard`.

    Raises:
        CheckpointError: The model cannot be run block by block.
        RecipeError: Samples that its tokenizer makes nothing of.
        NumericalError: Hidden states or statistics are not finite.
    """
    return _Measuring(run).run()


class _Measuring:
    """The run of a shard of statistics."""

    def __init__(self, run: ShardRun) -> None:
        self._run = run
        self._shard = run.work
        [setting] = run.work.settings
        self._work = msgspec.convert(setting.parameters, StatisticsWork)
        self._storage = run.storage
        self._device = run.device
        self._given = iter(run.work.shard.problems[0].given)

    def run(self) -> Receipt:
        """The receipt of what is measured, or was by an earlier merge; either is looked for twice,
        since another merge may be measuring the same right now.
        """
        found = self._find_kept(peak_bytes=0)
        if found is None:
            results, num_tokens = self._measure()
            peak_bytes = self._shard.shard.problems[0].host_bytes
            found = self._find_kept(peak_bytes) or self._write(results, num_tokens, peak_bytes)
        write_receipt(self._storage, self._shard.output_uri, found)
        self._run.tell(len(self._shard.shard.problems), self._shard.shard.size)
        return found

    def _find_kept(self, peak_bytes: int) -> Receipt | None:
        """A receipt for what is kept of an earlier merge, if it is whole."""
        if not self._shard.shard.folder:
            return None
        [uri] = self._shard.file_uris
        with self._run.timed("fetch"):
            record = find_kept(self._storage, uri)
        if record is None:
            return None
        self._run.bytes_read += record.size
        self._run.read_requests += 1
        stat = ObjectStat(uri, record.size, record.version)
        receipt = self._run.receipt(stat, record.sha256, record.problems, peak_bytes)
        return msgspec.structs.replace(receipt, reused=True)

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
        runner = BlockRunner(skeleton, work, self._device)
        with (
            self._run.timed("solve"),
            float32_products(torch.device(self._device)),
            torch.no_grad(),
        ):
            left = runner.run(tokens, hidden, images, self._check_cancelled)
            results = self._results(tokens, left, runner)
        return results, int((tokens != PADDING).sum())

    def _go_back(self) -> tuple[list[torch.Tensor], int]:
        fisher = FisherRun(self._work, self._read, self._device)
        with self._run.timed("solve"):
            results = fisher.run(self._check_cancelled)
            self._check_finite(results)
        return results, fisher.num_tokens

    def _read(self) -> torch.Tensor:
        """The next of what the shard is given, flat."""
        source: Source = next(self._given)
        file = self._shard.files[source.file]
        data = torch.empty(source.num_bytes, dtype=torch.uint8)
        if source.num_bytes:
            buffer = data.numpy().data
            with self._run.timed("fetch"):
                self._storage.read_into(file.uri, source.start, buffer, version=file.version)
        self._run.bytes_read += source.num_bytes
        self._run.read_requests += 1
        return data.view(torch_dtype(source.dtype))

    def _check_cancelled(self) -> None:
        self._run.check_cancelled()
        self._run.tell(0, 0)

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

    def _write(self, results: list[torch.Tensor], num_tokens: int, peak_bytes: int) -> Receipt:
        shard = self._shard.shard
        budget = MemoryBudget(self._shard.memory_budget)
        with (
            self._run.timed("write"),
            ShardFiles(self._storage, self._shard.file_uris, shard.size, budget) as files,
        ):
            files.write(shard_header(shard.problems))
            for problem, result in zip(shard.problems, results, strict=True):
                assert result.numel() == problem.num_entries
                files.write(result)
            [(stat, sha256)] = files.finish()
        receipt = self._run.receipt(stat, sha256, self._figures(num_tokens), peak_bytes)
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
                solve_seconds=0.0 if number else round(self._run.seconds["solve"], 6),
                figures={} if number else told,
            )
            for number, problem in enumerate(self._shard.shard.problems)
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    return all(bool(torch.isfinite(e)) for e in torch.aminmax(tensor)) if tensor.numel() else True
