"""Filters that lists and streams have in common."""

from __future__ import annotations

import re
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from service.api.deps import LABEL_PREFIX
from service.api.schemas import LABEL

WORD = r"^[A-Za-z0-9_.-]{1,64}$"


class LabelQuery(BaseModel):
    """What comes besides the fields is ``label.<name>=<value>``, any number of times."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        for name, value in self.labels.items():
            if not re.fullmatch(LABEL, name):
                raise ValueError(
                    f"{name[:64]!r} cannot be a label: 1 to 63 letters, digits and _ . / -"
                )
            if not isinstance(value, str) or "\x00" in value:
                raise ValueError(f"give label.{name} once, as plain text")
        return self

    @property
    def labels(self) -> dict[str, Any]:
        """The labels to be matched."""
        extra = self.model_extra or {}
        return {
            name.removeprefix(LABEL_PREFIX): value
            for name, value in extra.items()
            if name.startswith(LABEL_PREFIX)
        }
