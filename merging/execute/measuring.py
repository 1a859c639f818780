"""What is measured at the modules of a running model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from merging.errors import CheckpointError
from merging.execute.mixture import Mixture
from merging.execute.skeleton import Done, Layer, Skeleton
from merging.plan.statistics_work import Measure

FEWEST_ROUTED_ROWS = 16
"""An expert of a mixture that fewer tokens reach counts as not measured (docs/calibration.md)."""


class Meter:
    """One statistic: summed up in float64 over batches, from float32 products.

    Args:
        measure: What is measured.
        max_rows: Most rows that there can be.
        device: Where it is.

    Attributes:
        measure: What is measured.
        fewest_rows: With fewer, nothing counts as measured.
    """

    def __init__(self, measure: Measure, max_rows: int, device: str) -> None:
        self.measure = measure
        self.fewest_rows = 0
        self._count = 0
        width = measure.width
        shape = {"gram": (width, width), "rows": (max_rows, width), "norm": (width,)}[measure.kind]
        dtype = torch.float32 if measure.kind == "rows" else torch.float64
        self._sum = torch.zeros(shape, dtype=dtype, device=device)

    def add(self, module: nn.Module, rows: torch.Tensor) -> None:
        """Take in rows (n×width) of a module's input."""
        if self.measure.kind == "gram":
            self._sum += rows.t() @ rows
        elif self.measure.kind == "norm":
            normalised = _normalised(module, rows)
            if normalised is None:
                return
            self._sum += normalised.square_().sum(0, dtype=torch.float64)
        else:
            if self._count + len(rows) > len(self._sum):
                raise _unlike(self.measure.modules[0], "is run more than once for a token")
            self._sum[self._count : self._count + len(rows)] = rows
        self._count += len(rows)

    def result(self) -> torch.Tensor:
        """The flat statistic, and behind it the number of rows; zeros if that is too few."""
        if self._count < self.fewest_rows:
            self._sum.zero_()
            self._count = 0
        return torch.cat(
            [self._sum.reshape(-1).float(), self._sum.new_tensor([self._count])]
        ).float()


class StackMeter:
    """The statistics of all experts of a mixture that are one parameter.

    Args:
        measure: What is measured, with the number of experts.
        max_rows: As of each :class:`Meter`.
        device: Likewise.

    Attributes:
        measure: What is measured.
        experts: A meter for each.
    """

    def __init__(self, measure: Measure, max_rows: int, device: str) -> None:
        self.measure = measure
        self.experts = [Meter(measure, max_rows, device) for _ in range(measure.num_experts)]

    def result(self) -> torch.Tensor:
        """The flat statistics, one after the other, and behind them their numbers of rows."""
        results = [meter.result() for meter in self.experts]
        return torch.cat([r[:-1] for r in results] + [r[-1:] for r in results])


def make_meter(measure: Measure, max_rows: int, device: str) -> Meter | StackMeter:
    """What takes a measure; arguments as of :class:`Meter`."""
    kind = StackMeter if measure.num_experts else Meter
    return kind(measure, max_rows, device)


class Observer:
    """Hooks on the measured modules, and the batch that is running.

    Attributes:
        passed: The block in question has been run on this batch.
    """

    def __init__(self, skeleton: Skeleton, meters: Sequence[Meter | StackMeter]) -> None:
        self.passed = False
        self._mask = torch.empty(0)
        self._seen: dict[Meter, torch.Tensor] = {}
        self._missing: set[str] = set()
        self._names: set[str] = set()
        self._mixtures: dict[str, Mixture] = {}
        places: list[tuple[Meter, str, Layer]] = []
        for meter in meters:
            for name in meter.measure.modules:
                if isinstance(meter, StackMeter):
                    layers = skeleton.find_experts(name)
                    places += [
                        (own, name, layer) for own, layer in zip(meter.experts, layers, strict=True)
                    ]
                else:
                    places.append((meter, name, skeleton.find_layer(name)))
        for meter, name, layer in places:
            if layer.weight is None:
                self._names.add(name)
                self._hook(layer.module, name, meter)
            else:
                self._look_at_expert(skeleton, layer, meter)

    def begin(self, mask: torch.Tensor) -> None:
        """A new batch, B×L, of which the mask tells tokens from padding."""
        self.passed = False
        self._mask = mask.bool()
        self._seen.clear()
        self._missing = set(self._names)
        for mixture in self._mixtures.values():
            mixture.has_run = False

    def stop_if_done(self) -> None:
        """Raise :class:`Done` if nothing is missing any more."""
        if self.passed and not self._missing:
            raise Done

    def _look_at_expert(self, skeleton: Skeleton, layer: Layer, meter: Meter) -> None:
        """Have the rows measured that go into a layer of one expert of a mixture."""
        assert layer.weight is not None
        if layer.name not in self._mixtures:
            mixture = Mixture(layer.module, lambda: self._mask)
            self._mixtures[layer.name] = mixture
            skeleton.model.set_submodule(layer.name, mixture)
        meter.fewest_rows = FEWEST_ROUTED_ROWS

        def look(x: torch.Tensor) -> None:
            if x.dim() != 2 or x.shape[-1] != meter.measure.width:
                name = meter.measure.modules[0]
                raise _unlike(name, f"does not get {meter.measure.width} features")
            meter.add(layer.module, x.float())

        self._mixtures[layer.name].layers[layer.weight.data_ptr()] = look

    def check(self) -> None:
        """After a batch.

        Raises:
            CheckpointError: ``config_invalid``: a module was not run.
        """
        if self._missing:
            raise _unlike(min(self._missing), "is not run where its name says")
        for name, mixture in self._mixtures.items():
            if not mixture.has_run:
                raise _unlike(name, "is not run where its name says")

    def _hook(self, module: nn.Module, name: str, meter: Meter) -> None:
        def look(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0] if inputs else None
            if not isinstance(x, torch.Tensor) or x.shape[-1] != meter.measure.width:
                raise _unlike(name, f"does not get {meter.measure.width} features")
            if name in self._missing and meter in self._seen:
                if not _is_same(x, self._seen[meter]):
                    raise _unlike(name, f"does not read what {meter.measure.modules[0]} reads")
            elif name in self._missing or len(meter.measure.modules) == 1:
                self._seen[meter] = x
                meter.add(module, self._rows(x, name))
            else:
                raise _unlike(name, "is run more than once")
            self._missing.discard(name)

        def after(*_: Any) -> None:
            self.stop_if_done()

        module.register_forward_pre_hook(look)
        module.register_forward_hook(after)

    def _rows(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Rows of tokens, without padding."""
        batch, length = self._mask.shape
        width = x.shape[-1]
        if x.dim() > 2 and len(x) == batch:
            places = [dim for dim in range(1, x.dim() - 1) if x.shape[dim] == length]
            if places:  # as many heads as tokens: those of a token lie together
                tokens = max(places, key=x.stride)
                return x.movedim(tokens, 1)[self._mask].reshape(-1, width).float()
        if x.dim() == 2 and len(x) == batch * length:
            return x[self._mask.reshape(-1)].float()
        if x.dim() == 2 and len(x) == batch:  # a pooler, which reads one token
            return x.float()
        raise _unlike(name, f"gets {list(x.shape)}, which is not one row for a token")


def _is_same(x: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two inputs are one tensor: neither is freed, so that its memory tells."""
    return x.data_ptr() == other.data_ptr() and x.shape == other.shape


def _normalised(module: nn.Module, rows: torch.Tensor) -> torch.Tensor | None:
    """x̂: what a norm makes of its input before the scale; None of a kind that is not known."""
    if isinstance(module, nn.LayerNorm):
        return torch.nn.functional.layer_norm(rows, rows.shape[-1:], eps=module.eps)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" in type(module).__name__ and isinstance(eps, float):
        return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    return None


def _unlike(name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"The module {name} {what}, so that it cannot be measured. Leave it out with the parameter"
        " 'touch'.",
        code="config_invalid",
        context={"tensor_name": name},
    )
