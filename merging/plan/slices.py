"""Layers of a checkpoint under the numbers that they have in the output."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from merging.checkpoint.index import CheckpointIndex, TensorEntry
from merging.errors import Fault, RecipeError
from merging.method import MergeMethod
from merging.plan.inputs import Expert, Inputs
from merging.plan.modules import ModuleSplit
from merging.plan.wording import shorten_list
from merging.recipe import Recipe
from merging.recipe.recipe import Section
from merging.roles import Role, describe_tensor

_BEFORE_LAYERS = frozenset({"embedding", "position", "conv"})
"""Roles that stand before a model's first layer, where they are outside of any."""

_WHOLE = (0, 0)
"""In place of a range of layers: a module from whole models."""


def stands_before_layers(name: str, role: Role) -> bool:
    """Whether a tensor is used before the first layer (norms of embeddings are)."""
    if role.layer >= 0 or role.kind == "head":
        return False
    return role.kind in _BEFORE_LAYERS or "embed" in name


@dataclass(frozen=True, slots=True)
class Window:
    """Which tensors of a checkpoint a slice takes.

    Attributes:
        module: The part of the model that is meant; empty for all of it.
        start: Its first layer.
        num_layers: How many.
        first_layer: Number of the first one in the output.
        is_first: It takes what stands before the layers too.
        is_last: It takes what comes after the layers too.
    """

    module: str
    start: int
    num_layers: int
    first_layer: int
    is_first: bool
    is_last: bool


@dataclass(slots=True)
class LayeredCheckpoint:
    """A checkpoint's tensors by layer.

    Attributes:
        index: The checkpoint.
        stack: What stands before the number in the names of layers.
        layers: By number: tensors by what follows the number in their names.
        before: Tensors that are used before the first layer.
        after: All others outside the layers.
    """

    index: CheckpointIndex
    stack: str = ""
    layers: dict[int, dict[str, TensorEntry]] = field(default_factory=dict)
    before: dict[str, TensorEntry] = field(default_factory=dict)
    after: dict[str, TensorEntry] = field(default_factory=dict)
    _views: dict[Window, CheckpointIndex] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """How many layers there are, counted from 0 to the last."""
        return max(self.layers, default=-1) + 1

    def view(self, window: Window) -> CheckpointIndex:
        """The checkpoint with these tensors alone, by their names in the output.

        The entries keep the names that they have in the checkpoint.
        """
        if window not in self._views:
            tensors = dict(self.before) if window.is_first else {}
            for number in range(window.num_layers):
                layer = f"{self.stack}{window.first_layer + number}"
                for rest, entry in self.layers.get(window.start + number, {}).items():
                    tensors[f"{layer}.{rest}"] = entry
            if window.is_last:
                tensors |= self.after
            self._views[window] = dataclasses.replace(self.index, tensors=tensors)
        return self._views[window]


def by_layers(index: CheckpointIndex, pointer: str) -> LayeredCheckpoint:
    """Sort the tensors of a checkpoint by layers.

    Args:
        index: The checkpoint.
        pointer: Into the recipe, for a fault.

    Raises:
        RecipeError: ``incompatible_options``: it has not one stack of layers.
    """
    found = LayeredCheckpoint(index)
    layers: defaultdict[str, dict[int, dict[str, TensorEntry]]] = defaultdict(dict)
    for name, entry in index.tensors.items():
        role = describe_tensor(name, entry.shape, index.config)
        if role.layer >= 0:
            tower, _, rest = f".{name}".partition(f".{role.layer}.")
            stack = f"{tower}."[1:]
            layers[stack].setdefault(role.layer, {})[rest] = entry
        elif stands_before_layers(name, role):
            found.before[name] = entry
        else:
            found.after[name] = entry
    if len(layers) != 1:
        stacks = f"several stacks of layers ({shorten_list(list(layers))})" if layers else "none"
        detail = (
            f"Slices take layers of the one stack that a model has; {index.uri} has {stacks}. The"
            " parts of a model with several are merged with 'modules'."
        )
        fault = Fault(pointer, "incompatible_options", detail)
        raise RecipeError(detail, code="incompatible_options", faults=[fault])
    [(found.stack, found.layers)] = layers.items()
    return found


@dataclass(frozen=True, slots=True)
class SectionAddresses:
    """The addresses of a section: ``entries`` are of a model, and of an adapter on it."""

    pointer: str
    base: str | None
    entries: list[tuple[str, str | None]]


class SliceCutter:
    """Cuts the models of a recipe's slices to the layers that the slices take.

    Args:
        recipe: With slices.
        method: Its method.
        sections: Addresses of its slices' models.
        checkpoint: The checkpoint at an address.
        split: How modules divide models, if the recipe has any.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: MergeMethod,
        sections: Sequence[SectionAddresses],
        checkpoint: Callable[[str], CheckpointIndex],
        split: ModuleSplit | None,
    ) -> None:
        self._written = recipe.sections
        self._split = split
        self._method = method
        self._sections = sections
        self._checkpoint = checkpoint
        self._layered: dict[tuple[str, str], LayeredCheckpoint] = {}
        self._faults: list[Fault] = []

    def cut(self, experts: Sequence[Sequence[Expert]]) -> tuple[Inputs, ...]:
        """The inputs of each slice.

        Args:
            experts: Of each slice, with whole checkpoints.

        Raises:
            RecipeError: ``incompatible_options``, with a fault for each layer range that a model
                does not have, and for each base model whose layers are not said.
        """
        first_layer = 0
        cut = []
        modules = [one.module for one in self._written]
        for number, (own, section) in enumerate(zip(experts, self._sections, strict=True)):
            one = self._written[number]
            is_first = number == 0 or modules[number - 1] != one.module
            first_layer = 0 if is_first else first_layer
            window = Window(
                module=one.module,
                start=0,
                num_layers=one.num_layers,
                first_layer=first_layer,
                is_first=is_first,
                is_last=modules[number + 1 : number + 2] != [one.module],
            )
            base = self._base_range(one, section)
            own_range = one.entries[own[0].entry].layer_range or _WHOLE
            cut.append(
                Inputs(
                    method=self._method,
                    base=base and self._base(section, base, window),
                    experts=tuple(self._expert(e, one, section, window) for e in own),
                    first_layer=first_layer,
                    layer_range=base[0] if base else own_range,
                    module=one.module,
                )
            )
            first_layer += one.num_layers
        if self._faults:
            more = f" ({len(self._faults) - 1} more.)" if len(self._faults) > 1 else ""
            raise RecipeError(
                self._faults[0].detail + more, code="incompatible_options", faults=self._faults
            )
        return tuple(cut)

    def _base_range(
        self, one: Section, section: SectionAddresses
    ) -> tuple[tuple[int, int], int] | None:
        """The layers of the base model, those of its own entry, else those of all sources.

        Also the place of the entry that says so; None if the slice has no base.
        """
        if section.base is None:
            return None
        ranges = {entry.layer_range or _WHOLE: place for place, entry in enumerate(one.entries)}
        named = {
            one.entries[place].layer_range or _WHOLE: place
            for place, entry in enumerate(section.entries)
            if entry == (section.base, None)
        }
        if not (named or self._method.uses_base(is_named=True)):
            return None
        if len(named or ranges) > 1:
            detail = (
                f"Which layers of the base model {section.base} this slice takes is not clear: list"
                " it among the sources, once, with its layer_range."
            )
            self._refuse(section.pointer, detail)
        return next(iter((named or ranges).items()))

    def _base(
        self, section: SectionAddresses, found: tuple[tuple[int, int], int], window: Window
    ) -> CheckpointIndex:
        assert section.base is not None
        layers, place = found
        pointer = f"{section.pointer}/{place}/layer_range"
        return self._view(self._checkpoint(section.base), layers, window, pointer)

    def _expert(
        self, expert: Expert, one: Section, section: SectionAddresses, window: Window
    ) -> Expert:
        layers = one.entries[expert.entry].layer_range or _WHOLE
        pointer = f"{section.pointer}/{expert.entry}/layer_range"
        index = self._view(expert.index, layers, window, pointer)
        adapted = {
            name: expert.adapted[entry.name]
            for name, entry in index.tensors.items()
            if entry.name in expert.adapted
        }
        return dataclasses.replace(expert, index=index, adapted=adapted)

    def _view(
        self,
        index: CheckpointIndex,
        layers: tuple[int, int],
        window: Window,
        pointer: str,
    ) -> CheckpointIndex:
        if self._split is not None:
            index = self._split.part(index, window.module)
        if layers == _WHOLE:
            return index
        key = (index.uri, window.module)
        if key not in self._layered:
            self._layered[key] = by_layers(index, pointer)
        layered = self._layered[key]
        if layers[1] > layered.num_layers:
            detail = (
                f"{index.uri} has {layered.num_layers} layers, 0 to {layered.num_layers - 1}; the"
                f" range {list(layers)} goes beyond them."
            )
            self._refuse(pointer, detail)
        return layered.view(dataclasses.replace(window, start=layers[0]))

    def _refuse(self, pointer: str, detail: str) -> None:
        self._faults.append(Fault(pointer, "incompatible_options", detail))
