"""What the parameters of merge methods have in common.

A method's file declares its own as subclasses; recipes, the API's schema and the reference are made
from them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Parameters(BaseModel):
    """Base of every method's parameter model: frozen, unknown names refused, finite numbers.

    Each field carries a description (meaning, unit, effect of extremes) and its range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    recipe_wide: ClassVar[frozenset[str]] = frozenset()
    """Names whose value is one for the whole recipe, and used up when the merge is planned."""

    @classmethod
    def preset_values(cls, name: str | None) -> Mapping[str, Any]:
        """What a preset sets; nothing unless the model has presets."""
        del name
        return {}


Presets = Mapping[str, Mapping[str, Any]]
"""Values of parameters by the name of a published setting."""


class NoParameters(Parameters):
    """A method, or the experts of a method, without parameters."""


class TouchParameters(Parameters):
    """What every method's recipe-level parameters start with: which tensors it merges."""

    recipe_wide: ClassVar[frozenset[str]] = frozenset({"touch", "rest"})

    touch: str | tuple[str, ...] | None = Field(
        default=None,
        description=(
            "Tensors that the method merges: 'all' float tensors, 'linear' (the 2-D weights of"
            " linear layers; no embeddings, head or norms), or regular expressions searched for in"
            " tensor names. The method's own default if left out."
        ),
    )
    rest: Literal["base", "mean"] | None = Field(
        default=None,
        description=(
            "What the other float tensors become: the 'base' values or the experts' 'mean'."
            " The method's own default if left out."
        ),
    )

    svc: float | None = Field(
        default=None,
        gt=0,
        exclude_if=lambda value: value is None,
        description=(
            "Calibrate the singular values of layers' updates after the merge (arXiv:2602.05536),"
            " so that directions that tasks share do not count several times. α, the least that a"
            " task counts: 0.1 for sums and iso_c, 0.2 for iso_cts, 1 for tsv_m and wudi in the"
            " paper. Reads the models once more."
        ),
    )

    @field_validator("touch")
    @classmethod
    def _check_patterns(cls, touch: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for pattern in (touch,) if isinstance(touch, str) else touch or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return touch


class UpdateParameters(TouchParameters):
    """Recipe-level parameters of methods that solve for one update of a layer."""

    scale: float = Field(
        default=1.0, description="Factor on the merged update before it is added to the base."
    )


class PresetParameters(UpdateParameters):
    """Recipe-level parameters that have published settings.

    A subclass lists these in ``presets`` and their names in the type of ``preset``. A preset fills
    in what the recipe leaves out before anything is validated, so that plans hold the values and
    not the name.
    """

    recipe_wide: ClassVar[frozenset[str]] = UpdateParameters.recipe_wide | {"preset"}
    presets: ClassVar[Presets] = {}

    @classmethod
    def preset_values(cls, name: str | None) -> Mapping[str, Any]:
        """What a preset sets; nothing for None or an unknown name."""
        return cls.presets.get(name or "", {})

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        name = values.get("preset")
        filled = {**cls.preset_values(name if isinstance(name, str) else None), **values}
        # To a model that looks at its input first, JSON's lists no longer are tuples.
        return {key: tuple(v) if isinstance(v, list) else v for key, v in filled.items()}


class TaskVectorParameters(TouchParameters):
    """Recipe-level parameters of methods that add a combination of task vectors to the base."""

    model_config = ConfigDict(serialize_by_alias=True)

    scale: float = Field(
        default=1.0,
        alias="lambda",
        description=(
            "λ, the factor on the combined task vectors before they are added to the base;"
            " 0 gives the base."
        ),
    )
    int8_mask: bool = Field(
        default=False,
        description="Accepted for mergekit recipes; changes nothing, since no mask is ever stored.",
    )


class WeightParameters(Parameters):
    """Parameters of an expert that enters a sum."""

    weight: float = Field(
        default=1.0,
        description="Factor on this expert in the sum; 0 leaves it out, a negative one subtracts.",
    )
