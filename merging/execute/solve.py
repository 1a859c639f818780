"""Solving one piece: inputs to the device, checks, the method's function, the cast to output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from merging.dtypes import torch_dtype
from merging.errors import NumericalError
from merging.execute.experts import ExpertMaker
from merging.execute.pieces import Piece
from merging.execute.treatment import Treatment
from merging.method import MergeMethod, Task
from merging.plan.plan import ShardWork, Source

if TYPE_CHECKING:
    import torch

_CHECK_BLOCK = 1 << 18
"""Entries looked at together by the finiteness check: small enough to stay in cache."""


class Solver:
    """Turns inputs into output tensors on one device.

    Attributes:
        given: What problems are given beside their inputs; to be set before they are solved.
    """

    def __init__(self, work: ShardWork, device: str) -> None:
        self.given: Mapping[Source, torch.Tensor] = {}
        self._work = work
        self._memory: defaultdict[int, dict[str, Any]] = defaultdict(dict)
        self._device = device
        self._experts = ExpertMaker(device)
        self._copies: torch.cuda.Stream | None = None
        if device != "cpu":
            import torch

            self._copies = torch.cuda.Stream(device)

    def solve(
        self, piece: Piece, inputs: Iterator[torch.Tensor], figures: Sequence[dict[str, Any]]
    ) -> Generator[tuple[tuple[int, ...], torch.Tensor]]:
        """Merge one piece.

        Args:
            piece: Which entries of which problem.
            inputs: Flat host tensors in stored dtype: base first if there is one, then experts.
            figures: Filled with what the method reports, for each file of the shard.

        Yields:
            Numbers of files, and the flat contiguous host tensor in the output dtype for them.

        Raises:
            NumericalError: ``non_finite_input`` or ``non_finite_output``, naming the tensor.
        """
        problem = piece.problem
        treatment = piece.treatment
        reported = [figures[files[0]] for files in treatment.files]
        for place, merged in self._merge(piece, inputs, reported):
            result = merged.reshape(-1).to(torch_dtype(problem.dtype)).cpu()
            del merged  # its memory may be used again while the result is written
            if treatment.applied[place].step is not None and self._work.check_finite:
                what = f"The merged tensor {problem.tensor_name!r}"
                check_finite(result, what, "non_finite_output")
            files = treatment.files[place]
            for number in files[1:]:
                figures[number].update(reported[place])
            yield files, result

    def _merge(
        self,
        piece: Piece,
        inputs: Iterator[torch.Tensor],
        figures: Sequence[dict[str, Any]],
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The places of what is applied, and merged tensors on the device."""
        treatment, problem = piece.treatment, piece.problem
        if treatment.applied[0].step is None:  # then in all variants
            yield 0, next(inputs).clone()
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
            if len(group) == 1:
                step = treatment.applied[group[0]].step
                assert step is not None
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
            given=tuple(self.given[source].to(self._device) for source in problem.given),
            memory=self._memory[place],
            shape=problem.input_shape,
        )

    def _arrive(self, piece: Piece, inputs: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Inputs on the device; a host buffer is free again when the next one is asked for."""
        for position, host in enumerate(inputs):
            if self._work.check_finite:
                source = piece.sources[position]
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
    """There is no copy to wait for."""


def check_finite(flat: torch.Tensor, what: str, code: str) -> None:
    """Raise :class:`NumericalError` if a flat tensor holds NaN or infinity."""
    import torch

    if flat.dtype.itemsize == 1:
        flat = flat.to(torch.float32)
    for block in flat.split(_CHECK_BLOCK):
        if block.numel() and not all(bool(torch.isfinite(e)) for e in torch.aminmax(block)):
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
