"""Solving one piece: inputs to the device, checks, the method's function, the cast to output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merging.dtypes import torch_dtype
from merging.errors import NumericalError
from merging.execute.experts import ExpertMaker
from merging.execute.pieces import Piece
from merging.method import Step, Task, get_method
from merging.plan.plan import COPY, Setting, ShardWork, Source

if TYPE_CHECKING:
    import torch

_CHECK_BLOCK = 1 << 18
"""Entries looked at together by the finiteness check: small enough to stay in cache."""


@dataclass(frozen=True, slots=True)
class _Resolved:
    """A setting with its method's step looked up and its parameters validated."""

    step: Step | None
    parameters: Any
    expert_parameters: tuple[Any, ...]


def _resolve(setting: Setting) -> _Resolved:
    if setting.method == COPY:
        return _Resolved(None, None, ())
    method = get_method(setting.method)
    return _Resolved(
        method.step(setting.step),
        method.parameters.model_validate(setting.parameters),
        tuple(method.expert_parameters.model_validate(p) for p in setting.expert_parameters),
    )


class Solver:
    """Turns inputs into output tensors on one device.

    Attributes:
        given: What problems are given beside their inputs; to be set before they are solved.
    """

    def __init__(self, work: ShardWork, device: str) -> None:
        self.given: Mapping[Source, torch.Tensor] = {}
        self._work = work
        self._memory: dict[str, Any] = {}
        self._device = device
        self._settings = [_resolve(setting) for setting in work.settings]
        self._experts = ExpertMaker()
        self._copies: torch.cuda.Stream | None = None
        if device != "cpu":
            import torch

            self._copies = torch.cuda.Stream(device)

    def solve(
        self, piece: Piece, inputs: Iterator[torch.Tensor], figures: dict[str, Any]
    ) -> torch.Tensor:
        """Merge one piece.

        Args:
            piece: Which entries of which problem.
            inputs: Flat host tensors in stored dtype: base first if there is one, then experts.
            figures: Filled with what the method reports.

        Returns:
            Flat contiguous host tensor in the output dtype.

        Raises:
            NumericalError: ``non_finite_input`` or ``non_finite_output``, naming the tensor.
        """
        problem = piece.problem
        resolved = self._settings[problem.setting]
        merged = (
            next(inputs).clone()
            if resolved.step is None
            else self._merge(resolved.step, resolved, piece, inputs, figures)
        )
        result = merged.reshape(-1).to(torch_dtype(problem.dtype)).cpu()
        if resolved.step is not None and self._work.check_finite:
            check_finite(result, f"The merged tensor {problem.tensor_name!r}", "non_finite_output")
        return result

    def _merge(
        self,
        step: Step,
        resolved: _Resolved,
        piece: Piece,
        inputs: Iterator[torch.Tensor],
        figures: dict[str, Any],
    ) -> torch.Tensor:
        problem = piece.problem
        if piece.start == 0:
            self._memory = {}
        arriving = self._arrive(piece, inputs)
        base = next(arriving).view(piece.shape) if problem.base is not None else None
        task = Task(
            tensor_name=problem.tensor_name,
            parameters=resolved.parameters,
            expert_parameters=resolved.expert_parameters,
            seed=self._work.seed,
            offset=piece.start,
            row_block=problem.row_block,
            transposed=problem.transposed,
            ranks=problem.ranks if step.takes_adapters else (),
            figures=figures,
            given=tuple(self.given[source].to(self._device) for source in problem.given),
            memory=self._memory,
        )
        experts = self._experts.make(piece, base, arriving, expand=not step.takes_adapters)
        return step.merge(base if problem.sees_base else None, experts, task)

    def _arrive(self, piece: Piece, inputs: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Inputs on the device; a host buffer is free again when the next one is asked for."""
        for position, host in enumerate(inputs):
            if self._work.check_finite:
                source = piece.sources[position]
                check_finite(
                    host,
                    f"Tensor {piece.problem.tensor_name!r} in {self._work.files[source.file].uri}",
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
