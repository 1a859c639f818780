"""A recipe that has been read and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merging.selectors import ParameterValue, to_plain


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One entry under ``models``: a checkpoint's address and the parameters of this expert."""

    model: str
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)


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
        models: In recipe order; the base may be among them.
        base_model: Address of the base model.
        parameters: Of the merge, and defaults for all experts.
        dtype: Type of the merged tensors unless ``out_dtype`` is given (``bfloat16`` …). mergekit
            also computes in it; here arithmetic is in float32 whatever it says.
        out_dtype: Type of the merged tensors.
        name: What the user calls it.
        warnings: Keys that were accepted and have no effect here.
        sweep: The variants, if several are asked for; method and parameters are then those of the
            first.
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

    def normalised(self) -> dict[str, Any]:
        """The recipe as plain data in one form: sorted keys, numbers in their parameter's type,
        and without what equals the default. Reading it again gives an equal recipe.

        A sweep stays as it is written; the recipes of its variants have the one form.
        """
        if self.sweep is not None:
            return dict(self.sweep.document)
        plain = {
            "name": self.name,
            "merge_method": self.merge_method,
            "base_model": self.base_model,
            "models": [
                {"model": entry.model}
                | ({"parameters": _plain(entry.parameters)} if entry.parameters else {})
                for entry in self.models
            ],
            "parameters": _plain(self.parameters) or None,
            "dtype": self.dtype,
            "out_dtype": self.out_dtype,
        }
        return {key: value for key, value in sorted(plain.items()) if value is not None}

    @property
    def digest(self) -> str:
        """``sha256:…`` of the canonical JSON of :meth:`normalised`."""
        canonical = json.dumps(self.normalised(), sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def _plain(parameters: Mapping[str, ParameterValue]) -> dict[str, Any]:
    return {name: to_plain(value) for name, value in sorted(parameters.items())}
