"""The recipes of the benchmark: every method of the registry, from its declaration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality.encoder import MAX_TOKENS
from merging.method import MergeMethod

CALIBRATION_SAMPLES = 64


@dataclass(frozen=True)
class Tuned:
    """What a method's paper chooses on validation data.

    Attributes:
        key: The parameter.
        values: What is tried.
        settings: Other parameters as in the paper, where the defaults are others.
    """

    key: str
    values: tuple[float, ...]
    settings: dict[str, float] = field(default_factory=dict)


_LAMBDA = (0.3, 0.6, 1.0, 1.4)
_MEAN = (1.0, 2.0, 4.0, 6.0)
_ISO = (1.5, 2.0, 3.0, 4.0)
TUNED: dict[str, Tuned] = {
    "breadcrumbs": Tuned("lambda", _LAMBDA, {"density": 0.9}),
    "consensus_ta": Tuned("lambda", _LAMBDA),
    "consensus_ties": Tuned("lambda", _LAMBDA),
    "dare_linear": Tuned("lambda", _LAMBDA, {"density": 0.1}),
    "dare_ties": Tuned("lambda", _LAMBDA, {"density": 0.1}),
    "dc_merge": Tuned("scale", _MEAN),
    "iso_c": Tuned("scale", _ISO),
    "iso_cts": Tuned("scale", _ISO),
    "knots_ties": Tuned("lambda", _MEAN, {"density": 0.2}),
    "lot": Tuned("scale", (1.0, 1.5, 2.0)),
    "pcb": Tuned("lambda", _MEAN),
    "task_arithmetic": Tuned("lambda", _LAMBDA),
    "ties": Tuned("lambda", _MEAN, {"density": 0.2}),
    "tsv_m": Tuned("scale", (1.0, 1.4, 1.8, 2.4)),
}
"""Methods whose papers tune a factor on the merged update; the others have nothing to tune."""


@dataclass(frozen=True)
class Source:
    """An expert of a recipe.

    Attributes:
        folder: Its checkpoint.
        samples: A file of texts that it is for.
    """

    folder: Path
    samples: Path


def recipe(
    method: MergeMethod, base: Path, sources: Sequence[Source], parameters: dict[str, float]
) -> dict[str, Any]:
    """A merge of all experts; what is not in ``parameters`` is the method's default."""
    document: dict[str, Any] = {
        "merge_method": method.name,
        "models": [_entry(source, method) for source in sources],
        "parameters": parameters,
    }
    if method.needs_base:
        document["base_model"] = str(base)
    return document


def _entry(source: Source, method: MergeMethod) -> dict[str, Any]:
    if not method.calibrated:
        return {"model": str(source.folder)}
    calibration = {
        "data": str(source.samples),
        "samples": CALIBRATION_SAMPLES,
        "max_length": MAX_TOKENS,
        "batch": 32,
    }
    return {"model": str(source.folder), "calibration": calibration}
