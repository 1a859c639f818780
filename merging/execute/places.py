"""Where the tensors of a checkpoint go in a model of the installed transformers.

Checkpoints may call tensors differently, and often hold every expert of a mixture by itself where
the model has one parameter for all. Transformers knows its own names; what is done with the experts
is told here, so that each can be put in its place as it is read, without a second copy of all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_EXPERT = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor goes.

    Attributes:
        parameter: Of the model.
        expert: Number of the expert whose slice of it that is; None: it is the whole parameter.
        part: The slice may be of several tensors, one below the other: which of them this is.
        num_parts: How many there are.
    """

    parameter: str
    expert: int | None = None
    part: int = 0
    num_parts: int = 1

    @property
    def module(self) -> str:
        """Name of the module that has the parameter."""
        return self.parameter.rpartition(".")[0]

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tensor, for that of the parameter."""
        if self.expert is None:
            return whole
        return (whole[1] // self.num_parts, *whole[2:])

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The tensor's share of the parameter, or of its gradient: a view."""
        if self.expert is None:
            return whole
        rows = whole.shape[1] // self.num_parts
        return whole[self.expert].narrow(0, self.part * rows, rows)


class Places:
    """Finds places by the names of tensors.

    Args:
        model: The skeleton of a model.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        self._prefix: str = model.base_model_prefix
        self._parameters: Mapping[str, nn.Parameter] = dict(model.named_parameters())
        self._modules = frozenset(name for name, _ in model.named_modules())
        mapping = get_model_conversion_mapping(model)
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]

    def find(self, name: str) -> Place | None:
        """The place of a tensor; None if the model has none for it."""
        from transformers.core_model_loading import rename_source_key

        own = self.among(name, self._parameters)
        if own is not None:
            return Place(own)
        renamed, pattern = rename_source_key(name, self._renamings, self._converters)
        own = self.among(renamed, self._parameters)
        if own is None or pattern is None:
            return None if own is None else Place(own)
        [converter] = [c for c in self._converters if pattern in c.source_patterns]
        number = _EXPERT.findall(name)
        if not (number and _stacks(converter.operations)):
            return None
        parts = converter.source_patterns
        return Place(own, int(number[-1]), parts.index(pattern), len(parts))

    def stack(self, name: str) -> str | None:
        """The model's name of a list of blocks; None if it has no such module."""
        from transformers.core_model_loading import rename_source_key

        renamed, _ = rename_source_key(f"{name}.0.", self._renamings, [])
        return self.among(name, self._modules) or self.among(
            renamed.removesuffix(".0."), self._modules
        )

    def among(self, name: str, known: Iterable[str]) -> str | None:
        """A checkpoint's name as the model has it: with or without the base model's prefix."""
        candidates = (name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}."))
        return next((candidate for candidate in candidates if candidate in known), None)


def _stacks(operations: Iterable[Any]) -> bool:
    """Whether a conversion stacks experts, of each of which there may be several tensors."""
    told = [(type(one).__name__, getattr(one, "dim", None)) for one in operations]
    return told in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
