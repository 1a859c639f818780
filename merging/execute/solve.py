"""Solving one piece: inputs to the device, checks, the method's function, the cast to output."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from merging.dtypes import is_float, torch_dtype
from merging.errors import NumericalError
from merging.execute.experts import ExpertMaker
from merging.execute.memory import BufferPool
from merging.execute.pieces import Piece
from merging.execute.treatment import Treatment
from merging.method import MergeMethod, Task
from merging.plan.plan import ShardWork, Source

if TYPE_CHECKING:
    import torch

_CHECK_BLOCK = 1 << 18
"""Entries looked at together by the finiteness check: small enough to stay in cache."""


class Solved(NamedTuple):
    """A result.

    Attributes:
        files: Numbers of the files that it goes to.
        tensor: Flat and contiguous, on the host, in the type of the files.
        done: To be called when it is written.
    """

    files: tuple[int, ...]
    tensor: torch.Tensor
    done: Callable[[], None]


class Solver:
    """Turns inputs into output tensors on one device.

    Attributes:
        given: What problems are given beside their inputs; to be set before they are solved.

    Args:
        work: The shard.
        device: To solve on.
        buffers: For copies, and results that a CPU rounds.
    """

    def __init__(self, work: ShardWork, device: str, buffers: BufferPool) -> None:
        self.given: Mapping[Source, torch.Tensor] = {}
        self._work = work
        self._memory: defaultdict[int, dict[str, Any]] = defaultdict(dict)
        self._device = device
        self._experts = ExpertMaker(device)
        self._buffers = buffers
        self._buffer: torch.Tensor | None = None
        self._copies: torch.cuda.Stream | None = None
        if device != "cpu":
            import torch

            self._copies = torch.cuda.Stream(device)

    def solve(
        self, piece: Piece, inputs: Iterator[torch.Tensor], figures: Sequence[dict[str, Any]]
    ) -> Generator[Solved]:
        """Merge one piece.

        Args:
            piece: Which entries of which problem.
            inputs: Flat host tensors in stored dtype: base first if there is one, then experts.
            figures: Filled with what the method reports, for each file of the shard.

        Yields:
            One result after the other.

        Raises:
            NumericalError: ``non_finite_input`` or ``non_finite_output``, naming the tensor.
        """
        problem = piece.problem
        treatment = piece.treatment
        reported = [figures[files[0]] for files in treatment.files]
        for place, merged in self._merge(piece, inputs, reported):
            result = merged.reshape(-1).to(torch_dtype(problem.dtype)).cpu()
            done = self._done_with(result)
            del merged  # its memory may be used again while the result is written
            if treatment.applied[place].step is not None and self._work.check_finite:
                what = f"The merged tensor {problem.tensor_name!r}"
                check_finite(result, what, "non_finite_output")
            files = treatment.files[place]
            for number in files[1:]:
                figures[number].update(reported[place])
            yield Solved(files, result, done)
            del result

    def _merge(
        self,
        piece: Piece,
        inputs: Iterator[torch.Tensor],
        figures: Sequence[dict[str, Any]],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The places of what is applied, and merged tensors on the device."""
        treatment, problem = piece.treatment, piece.problem
        if treatment.applied[0].step is None:  # then in all variants
            yield 0, self._new_result(piece, "cpu").copy_(next(inputs))
            return
        if piece.start == 0:
            self._memory.clear()
        arriving = self._arrive(piece, inputs)
        base = next(arriving).view(piece.base_shape) if problem.base is not None else None
        made = self._experts.make(piece, base, arriving, expand=not treatment.takes_adapters)
        held = list(made) if len(treatment.groups) > 1 else None
        seen = base if problem.sees_base else None
        tasks = [self._task(piece, place, figures[place]) for place in range(len(figures))]
        for group in treatment.groups:
            experts = made if held is None else iter(held)
            if problem.has_own_experts:
                experts = itertools.islice(experts, treatment.files[group[0]][0], None)
            if len(group) == 1:
                step = treatment.applied[group[0]].step
                assert step is not None
                if step.rounds:
                    tasks[group[0]].out = self._new_result(piece, self._device)
                yield group[0], step.merge(seen, experts, tasks[group[0]])
            else:
                yield from _merge_layer(treatment, group, seen, experts, tasks)

    def _task(self, piece: Piece, place: int, figures: dict[str, Any]) -> Task:
        problem = piece.problem
        applied = piece.treatment.applied[place]
        return Task(
            tensor_name=problem.tensor_name,
            parameters=applied.parameters,
            expert_parameters=applied.expert_parameters,
            seed=self._work.seed,
            offset=piece.start,
            row_block=problem.row_block,
            transposed=problem.transposed,
            ranks=problem.ranks if piece.treatment.takes_adapters else (),
            figures=figures,
            given=tuple(
                self.given[source].to(self._device)
                for source in problem.given_to(piece.treatment.files[place][0])
            ),
            memory=self._memory[place],
            shape=problem.input_shape,
        )

    def _new_result(self, piece: Piece, device: str) -> torch.Tensor:
        """Memory for a result, on the host used again."""
        import torch

        dtype, num_bytes = torch_dtype(piece.problem.dtype), piece.output_bytes
        if device != "cpu":
            return torch.empty(num_bytes // dtype.itemsize, dtype=dtype, device=device)
        self._buffer = self._buffers.get(num_bytes)
        return self._buffer[:num_bytes].view(dtype)

    def _done_with(self, result: torch.Tensor) -> Callable[[], None]:
        """What to call when a result has been written."""
        buffer, self._buffer = self._buffer, None
        if buffer is None:
            return _nothing
        if buffer.data_ptr() != result.data_ptr():
            self._buffers.put(buffer)
            return _nothing
        return functools.partial(self._buffers.put, buffer)

    def _arrive(self, piece: Piece, inputs: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Inputs on the device; a host buffer is free again when the next one is asked for."""
        for position, host in enumerate(inputs):
            source = piece.sources[position]
            if self._work.check_finite and is_float(source.dtype):
                check_finite(
                    host,
                    f"Tensor {source.name or piece.problem.tensor_name!r} in"
                    f" {self._work.files[source.file].uri}",
                    "non_finite_input",
                )
            on_device, copied = self._upload(host)
            yield on_device
            copied()

    def _upload(self, host: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
        """Start copying to the device beside its computing; the callable waits for the copy."""
        if self._copies is None:
            return host, _nothing
        import torch

        done = torch.cuda.Event()
        with torch.cuda.stream(self._copies):
            on_device = host.to(self._device, non_blocking=True)
            done.record(self._copies)
        solving = torch.cuda.current_stream(self._device)
        solving.wait_event(done)
        on_device.record_stream(solving)
        return on_device, done.synchronize


def _merge_layer(
    treatment: Treatment,
    group: Sequence[int],
    base: torch.Tensor | None,
    experts: Iterator[torch.Tensor],
    tasks: Sequence[Task],
) -> Iterator[tuple[int, torch.Tensor]]:
    """The variants of a group, which share one pass over the experts."""
    from merging.ops.layers import merge_layer

    assert base is not None
    solvers = []
    for place in group:
        step = treatment.applied[place].step
        assert isinstance(step, MergeMethod)
        assert step.layer is not None
        solvers.append((step.layer, tasks[place]))
    for number, merged in merge_layer(base, experts, solvers):
        yield group[number], merged
        del merged


def _nothing() -> None:
    """There is no copy to wait for, and no buffer to use again."""


def check_finite(flat: torch.Tensor, what: str, code: str) -> None:
    """Raise :class:`NumericalError` if a flat tensor holds NaN or infinity."""
    import torch

    if flat.dtype.itemsize == 1:
        flat = flat.to(torch.float32)
    for block in flat.split(_CHECK_BLOCK):
        if block.numel() and not all(math.isfinite(e) for e in torch.aminmax(block)):
            nan = int(torch.isnan(flat).sum())
            infinite = int(torch.isinf(flat).sum())
            first = int((~torch.isfinite(flat)).nonzero()[0])
            advice = (
                "Repair that checkpoint, leave it out, or merge with check_finite=false."
                if code == "non_finite_input"
                else "The inputs are finite, so the output dtype or a scale is too small or large."
            )
            raise NumericalError(
                f"{what} holds {nan} NaN and {infinite} infinite values"
                f" (first at flat index {first} of the part looked at). {advice}",
                code=code,
            )
