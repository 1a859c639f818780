"""A recipe that has been read and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from merging.recipe.addresses import split_adapter
from merging.recipe.document import escape_pointer
from merging.recipe.tokenizer import TokenizerChoice
from merging.selectors import ParameterValue, to_plain

Level = Mapping[str, ParameterValue]
"""The ``parameters`` of one place in a recipe."""


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A checkpoint's address and the parameters of this expert.

    Attributes:
        model: The address.
        parameters: Of this expert.
        layer_range: The layers ``[a, b)`` that a slice takes; None takes the whole model.
        calibration: Where this expert's samples are, as far as the recipe does not say it for all.
    """

    model: str
    parameters: Level = field(default_factory=dict)
    layer_range: tuple[int, int] | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive layers of the output: equally many layers of each source, merged.

    Attributes:
        sources: What is merged; the base may be among them.
        base_model: Address of the base model of this slice.
        parameters: Of this slice, and defaults for its sources.
    """

    sources: tuple[ModelEntry, ...]
    base_model: str | None = None
    parameters: Level = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Module:
    """A part of a model with several (vision tower, decoder …), merged in its own way.

    Attributes:
        name: Of the part; see :mod:`merging.plan.modules`.
        slices: Its layers; one slice of sources without layer ranges takes all of it.
        parameters: Of this part, and defaults for its slices.
    """

    name: str
    slices: tuple[Slice, ...]
    parameters: Level = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """It is merged from whole models (``models``, not ``slices``)."""
        return any(entry.layer_range is None for one in self.slices for entry in one.sources)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the output that is merged from the same models: a slice, a module, or all of it.

    Attributes:
        pointer: JSON pointer to the list of its models.
        entries: What is merged; the base may be among them.
        base_model: Address of its base model.
        levels: Parameters beside those of the entries, those that go before the others first.
        module: Name of the module that it belongs to; empty where there are none.
    """

    pointer: str
    entries: tuple[ModelEntry, ...]
    base_model: str | None
    levels: tuple[Level, ...]
    module: str = ""

    @property
    def num_layers(self) -> int:
        """How many layers a slice has; 0 if it takes whole models."""
        first, last = self.entries[0].layer_range or (0, 0)
        return last - first

    @property
    def owner(self) -> str:
        """JSON pointer to the slice, or to the recipe, that the list of models belongs to."""
        return self.pointer.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class Variant:
    """One variant of a sweep, as a recipe of its own; its name is the folder of its checkpoint."""

    name: str
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Sweep:
    """A recipe that asks for several variants: as it is written, and what it stands for."""

    document: Mapping[str, Any]
    variants: tuple[Variant, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to merge. Made by :func:`merging.recipe.parse_recipe`, which checks everything.

    Attributes:
        merge_method: Name of a registered method.
        models: In recipe order; the base may be among them. Empty if there are slices or modules.
        base_model: Address of the base model.
        parameters: Of the merge, and defaults for all experts.
        dtype: Type of the merged tensors unless ``out_dtype`` is given (``bfloat16`` …). mergekit
            also computes in it; here arithmetic is in float32 whatever it says.
        out_dtype: Type of the merged tensors.
        name: What the user calls it.
        warnings: Keys that were accepted and have no effect here.
        sweep: The variants, if several are asked for; method and parameters are then those of the
            first.
        slices: The layers of the output from the first to the last, if not taken from whole models.
        modules: The parts of the output, if they are merged in different ways.
        documents: Other recipes that this one, or one after them, refers to by name; each after
            those that it needs.
        pointer: Where it stands among the documents that it was read with.
        tokenizer: Which tokenizer the output has; None is that of the base or first model.
        chat_template: ``auto``, the name of a known one, or a Jinja template.
        calibration: Where samples are, for experts that do not say so themselves.
        architectures: By address of a model: the class that its config.json is taken to name
            (``override_architecture``), wherever the recipe names that model.
    """

    merge_method: str
    models: tuple[ModelEntry, ...]
    base_model: str | None = None
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    name: str | None = None
    warnings: tuple[str, ...] = field(default=(), compare=False)
    sweep: Sweep | None = None
    slices: tuple[Slice, ...] = ()
    modules: tuple[Module, ...] = ()
    documents: tuple[Recipe, ...] = ()
    pointer: str = field(default="", compare=False)
    tokenizer: TokenizerChoice | None = None
    chat_template: str | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    architectures: Mapping[str, str] = field(default_factory=dict)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of all methods: of the documents in the order of their steps, or of the variants;
        each once.
        """
        variants = self.sweep.variants if self.sweep else ()
        recipes = [variant.recipe for variant in variants] or [*self.documents, self]
        return tuple(dict.fromkeys(one.merge_method for one in recipes))

    @property
    def sections(self) -> tuple[Section, ...]:
        """The parts of the output, in the order of their layers."""
        if self.modules:
            return tuple(section for module in self.modules for section in self._sections(module))
        if not self.slices:
            return (Section("/models", self.models, self.base_model, (self.parameters,)),)
        return tuple(
            Section(
                f"/slices/{number}/sources",
                one.sources,
                one.base_model or self.base_model,
                (one.parameters, self.parameters),
            )
            for number, one in enumerate(self.slices)
        )

    def _sections(self, module: Module) -> Iterator[Section]:
        owner = f"/modules/{escape_pointer(module.name)}"
        for number, one in enumerate(module.slices):
            yield Section(
                f"{owner}/models" if module.is_whole else f"{owner}/slices/{number}/sources",
                one.sources,
                one.base_model or self.base_model,
                (one.parameters, module.parameters, self.parameters),
                module.name,
            )

    def normalised(self) -> dict[str, Any]:
        """The recipe as plain data in one form: sorted keys, numbers in their parameter's type,
        and without what equals the default. Reading it again gives an equal recipe.

        A sweep stays as it is written; the recipes of its variants have the one form. Documents
        stand in the order in which they need each other.
        """
        if self.sweep is not None:
            return dict(self.sweep.document)
        if self.documents:
            last = replace(self, documents=())
            return {"documents": [one.normalised() for one in (*self.documents, last)]}
        name = self._plain_model
        plain = {
            "name": self.name,
            "merge_method": self.merge_method,
            "base_model": name(self.base_model),
            "models": [_plain_entry(entry, name) for entry in self.models] or None,
            "slices": [_plain_slice(one, name) for one in self.slices] or None,
            "modules": {one.name: _plain_module(one, name) for one in self.modules} or None,
            "parameters": _plain(self.parameters) or None,
            "calibration": dict(self.calibration) or None,
            "dtype": self.dtype,
            "out_dtype": self.out_dtype,
            "chat_template": self.chat_template,
            **(self.tokenizer.plain() if self.tokenizer else {}),
        }
        return {key: value for key, value in sorted(plain.items()) if value is not None}

    def _plain_model(self, address: str | None) -> str | dict[str, str] | None:
        """A model's address, or the mapping that says its architecture too."""
        model, adapter = split_adapter(address or "")
        if model not in self.architectures:
            return address
        lora = {"lora": adapter} if adapter else {}
        return {"model": model, **lora, "override_architecture": self.architectures[model]}

    @property
    def digest(self) -> str:
        """``sha256:…`` of the canonical JSON of :meth:`normalised`."""
        canonical = json.dumps(self.normalised(), sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


_PlainModel = Callable[[str | None], Any]
"""How the recipe writes a model."""


def _plain(parameters: Mapping[str, ParameterValue]) -> dict[str, Any]:
    return {name: to_plain(value) for name, value in sorted(parameters.items())}


def _plain_entry(entry: ModelEntry, name: _PlainModel) -> dict[str, Any]:
    return (
        {"model": name(entry.model)}
        | ({"layer_range": list(entry.layer_range)} if entry.layer_range else {})
        | ({"parameters": _plain(entry.parameters)} if entry.parameters else {})
        | ({"calibration": dict(entry.calibration)} if entry.calibration else {})
    )


def _plain_module(module: Module, name: _PlainModel) -> dict[str, Any]:
    parameters = {"parameters": _plain(module.parameters)} if module.parameters else {}
    if module.is_whole:
        return {"models": [_plain_entry(e, name) for e in module.slices[0].sources]} | parameters
    return {"slices": [_plain_slice(one, name) for one in module.slices]} | parameters


def _plain_slice(one: Slice, name: _PlainModel) -> dict[str, Any]:
    return (
        {"sources": [_plain_entry(entry, name) for entry in one.sources]}
        | ({"base_model": name(one.base_model)} if one.base_model else {})
        | ({"parameters": _plain(one.parameters)} if one.parameters else {})
    )
