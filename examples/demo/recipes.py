"""What the demo merges: one job for each row. Everything else follows from this table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from examples.demo.corpus import EXPERT_KINDS


@dataclass(frozen=True, slots=True)
class Merge:
    """A merge of all experts.

    Attributes:
        title: For people.
        method: As in recipes.
        parameters: What differs from the method's defaults.
        uses_base: Whether the method looks at the base model.
    """

    title: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    uses_base: bool = True

    def recipe(self, models_uri: str) -> dict[str, Any]:
        """The recipe, for models that are under ``models_uri`` by name."""
        base = {"base_model": f"{models_uri}/base"} if self.uses_base else {}
        return {
            "name": f"demo-{self.method}",
            "merge_method": self.method,
            **base,
            "models": [{"model": f"{models_uri}/{kind}"} for kind in EXPERT_KINDS],
            "parameters": dict(self.parameters),
            "dtype": "bfloat16",
        }


MERGES = (
    Merge("Plain average", "linear", uses_base=False),
    Merge("TIES", "ties", {"density": 0.2}),  # the paper's
    Merge("WUDI", "wudi"),
    Merge("WUDI-CFS", "wudi_cfs"),
    Merge("SWUDI-A", "swudi_a"),
)
