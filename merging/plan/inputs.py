"""The checkpoints of a merge, as planning sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from merging.checkpoint.adapter import AdapterIndex
from merging.checkpoint.index import CheckpointIndex
from merging.method import MergeMethod
from merging.plan.adapters import AdaptedTensor


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert.

    Attributes:
        index: Its checkpoint; of an adapter, the model that it is put on.
        entry: Its place among the models of its section of the recipe.
        pointer: JSON pointer to its address.
        adapter: What is put on the checkpoint, if anything is.
        adapted: What that makes of the checkpoint's tensors, by name.
    """

    index: CheckpointIndex
    entry: int
    pointer: str
    adapter: AdapterIndex | None = None
    adapted: Mapping[str, AdaptedTensor] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Of the checkpoint, with that of the adapter on it."""
        return f"{self.index.uri}+{self.adapter.uri}" if self.adapter else self.index.uri


@dataclass(frozen=True, slots=True)
class Inputs:
    """All input checkpoints, or those of a slice.

    The checkpoints of a slice hold only the tensors that it takes, by their names in the output.

    Attributes:
        method: The recipe's method.
        base: The base model; for a method that needs none, the model that ``base_model`` names.
        experts: What is merged, in recipe order; of a recipe with slices, each once.
        slices: What each slice of the recipe merges, or each of its modules; modules that it does
            not list come last, without experts.
        slice_bases: Base models that slices name themselves.
        first_layer: Of a slice, the number of its first layer in the output.
        layer_range: Of a slice, the layers of its donor.
        module: Of a slice, the part of the model that it belongs to.
    """

    method: MergeMethod
    base: CheckpointIndex | None
    experts: tuple[Expert, ...]
    slices: tuple[Inputs, ...] = ()
    slice_bases: tuple[CheckpointIndex, ...] = ()
    first_layer: int = 0
    layer_range: tuple[int, int] = (0, 0)
    module: str = ""

    @property
    def is_sliced(self) -> bool:
        """It takes some layers of its models, and not all that they have."""
        return self.layer_range != (0, 0)

    @property
    def sections(self) -> tuple[Inputs, ...]:
        """What is merged from the same models: the slices, or all of it."""
        return self.slices or (self,)

    @property
    def merged(self) -> tuple[Inputs, ...]:
        """The sections that have experts; others are the donor's."""
        return tuple(section for section in self.sections if section.experts)

    @property
    def donor(self) -> CheckpointIndex:
        """The model whose tensors, config and tokenizer set the pattern: the base if there is one,
        otherwise the first expert.
        """
        return self.base or self.experts[0].index

    @property
    def all_indexes(self) -> tuple[CheckpointIndex, ...]:
        """Every checkpoint once, donor first."""
        indexes = [self.donor, *(expert.index for expert in self.experts), *self.slice_bases]
        return tuple({index.uri: index for index in indexes}.values())
