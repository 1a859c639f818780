"""What a recipe says of the samples that calibrated methods look at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from merging.errors import Fault
from merging.recipe.parameters import explain, nearest, shorten


class CalibrationSettings(BaseModel):
    """The samples of one expert, as ``calibration`` of the recipe and of the model say together."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    data: str | list[str | list[int]] = Field(
        min_length=1,
        description=(
            "Address of a JSON Lines file, one object a line; or the samples themselves: texts, or"
            " lists of token ids. For a vision model, of a safetensors file."
        ),
    )
    field: str | None = Field(
        default=None,
        min_length=1,
        description=(
            "Key of a line's object that holds the sample: a text, a list of token ids, or with"
            " chat_template a list of messages; 'text' by default. Of images the name of the"
            " tensor, 'pixel_values' by default."
        ),
    )
    samples: int = Field(
        default=64, ge=1, le=100_000, description="How many are used: the first ones."
    )
    max_length: int = Field(
        default=512,
        ge=1,
        le=1_000_000,
        description=(
            "Most tokens of a sample. Longer texts are cut; more token ids are an error, since"
            " nobody else could cut them."
        ),
    )
    chat_template: bool = Field(
        default=False,
        description="Texts and messages go through the chat template of the expert's tokenizer.",
    )
    labels: Literal["sampled", "given"] = Field(
        default="sampled",
        description=(
            "What the model's likelihood is of where a method needs gradients (fisher): tokens that"
            " are 'sampled' from its predictions, or the 'given' next tokens."
        ),
    )
    batch: int = Field(
        default=8,
        ge=1,
        le=4096,
        description="Samples that go through a block at once; more take more memory.",
    )


def read_calibration(raw: Any, pointer: str, faults: list[Fault]) -> dict[str, Any]:
    """Check one ``calibration`` mapping, of the recipe or of a model; either may be partial.

    Args:
        raw: Plain data; None where there is none.
        pointer: Where it stands.
        faults: What is wrong is added here.
    """
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        faults.append(Fault(pointer, "bad_parameter", "'calibration' is a mapping of names."))
        return {}
    fields = CalibrationSettings.model_fields
    for name, value in raw.items():
        if name not in fields:
            detail = f"Unknown key {shorten(name)} of 'calibration'.{nearest(name, fields)}"
            faults.append(Fault(f"{pointer}/{name}", "bad_parameter", detail))
            continue
        try:
            CalibrationSettings.model_validate({"data": "x", name: value})
        except ValidationError as error:
            detail = f"{explain(error, name)}, not {shorten(value)}. {fields[name].description}"
            faults.append(Fault(f"{pointer}/{name}", "bad_parameter", detail))
    return raw


def join_calibration(
    recipe: Mapping[str, Any], model: Mapping[str, Any]
) -> CalibrationSettings | None:
    """The settings of one model, its own before the recipe's; None if no data are named."""
    joined = {**recipe, **model}
    if "data" not in joined:
        return None
    return CalibrationSettings.model_validate_json(json.dumps(joined), strict=True)
