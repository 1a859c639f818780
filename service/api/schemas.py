"""Bodies of requests. Unknown fields are refused: a typo must not be ignored."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from merging.options import MergeOptions
from service.auth import Scope
from service.jobs.records import CancelMode


def _document(value: object) -> object:
    if isinstance(value, str | dict):
        return value
    raise ValueError("should be the recipe: YAML or JSON text, or an object")


RecipeField = Annotated[
    str | dict[str, Any],
    BeforeValidator(_document),
    Field(description="The recipe: YAML or JSON text, or an object."),
]
_PLAN_ID = r"^plan_[0-9a-z]{26}$"
NO_CONTROLS = r"^[^\x00-\x1f\x7f]*$"
"""Of text on one line."""

LABEL = r"^[A-Za-z0-9]([A-Za-z0-9_./-]{0,62})$"
Label = Annotated[str, StringConstraints(pattern=LABEL)]
LabelValue = Annotated[str, StringConstraints(pattern=NO_CONTROLS, max_length=255)]
Labels = Annotated[
    dict[Label, LabelValue],
    Field(max_length=32, description="For finding jobs: ?label.team=vision."),
]
MetadataValue = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$", max_length=4096)]
Metadata = Annotated[
    dict[Label, MetadataValue], Field(max_length=32, description="Notes of your own.")
]
Priority = Annotated[int, Field(ge=-100, le=100, description="Higher is run first.")]
OutputUri = Annotated[
    str,
    StringConstraints(min_length=1, max_length=2048, pattern=NO_CONTROLS),
    Field(description="Where the merged checkpoint goes: a folder, file:// or s3:// address."),
]


class Request(BaseModel):
    """Base of request bodies."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


_RECIPE = {
    "merge_method": "ties",
    "base_model": "s3://models/base",
    "models": [{"model": "s3://models/chat"}, {"model": "s3://models/code"}],
    "parameters": {"density": 0.3},
}


def examples(*examples: dict[str, Any]) -> ConfigDict:
    """Shown in the OpenAPI document; a test sends each of them."""
    return ConfigDict(json_schema_extra={"examples": list(examples)})


class RecipeDocument(Request):
    """A recipe to be checked."""

    model_config = examples({"recipe": _RECIPE}, {"recipe": "merge_method: linear\nmodels: []\n"})

    recipe: RecipeField


class PlanRequest(Request):
    """A merge to be planned."""

    model_config = examples(
        {
            "recipe": _RECIPE,
            "output_uri": "s3://models/merged",
            "options": {"max_shard_size": "5GB"},
        }
    )

    recipe: RecipeField
    output_uri: OutputUri
    options: MergeOptions = MergeOptions()


class IntegrationRequest(Request):
    """Who is to be told of a job elsewhere."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=32, pattern=NO_CONTROLS)]
    options: dict[str, Any] = {}


class JobSubmission(Request):
    """A merge to be run: ``recipe`` and ``output_uri`` with ``options``, or a ``plan_id``."""

    model_config = examples(
        {
            "recipe": _RECIPE,
            "output_uri": "s3://models/merged",
            "labels": {"team": "language"},
            "deadline_seconds": 3600,
        },
        {"plan_id": "plan_01kb7z6m3q9v5x2c8d4f6g7h0j", "priority": 10},
    )

    recipe: RecipeField | None = None
    output_uri: OutputUri | None = None
    options: MergeOptions = MergeOptions()
    plan_id: str | None = Field(
        default=None, pattern=_PLAN_ID, description="Run exactly this stored plan, or nothing."
    )
    type: Literal["merge"] = "merge"
    labels: Labels = {}
    metadata: Metadata = {}
    priority: Priority = 0
    deadline_seconds: float | None = Field(
        default=None, gt=0, le=31_536_000, description="Fail the job if it takes longer."
    )
    integrations: list[IntegrationRequest] | None = Field(
        default=None, max_length=8, description="Default: those that the deployment chose."
    )


class Resubmission(Request):
    """What a job made from another one's recipe does differently."""

    model_config = examples({"output_uri": "s3://models/merged-again"})

    output_uri: OutputUri | None = None
    options: MergeOptions | None = None


class JobPatch(Request):
    """What can be changed in a job; what is absent stays."""

    model_config = examples({"labels": {"team": "vision"}}, {"priority": 50})

    labels: Labels | None = None
    priority: Priority | None = None


class CancelRequest(Request):
    """How to stop a job."""

    model_config = examples({"mode": "orderly"})

    mode: CancelMode = Field(
        default="orderly", description="'now' ends worker processes instead of waiting for them."
    )


class TokenRequest(Request):
    """A token to be made."""

    model_config = examples({"name": "nightly", "scopes": ["jobs:read", "jobs:write"]})

    name: Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=NO_CONTROLS)]
    scopes: list[Scope] = Field(min_length=1, max_length=len(Scope))
    expires_at: AwareDatetime | None = None


def is_plan_id(text: str) -> bool:
    """Whether a plan could have this id."""
    return re.fullmatch(_PLAN_ID, text) is not None
