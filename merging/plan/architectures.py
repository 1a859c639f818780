"""Which model classes the installed transformers has, told without importing it (or torch)."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path

_TABLES = (
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
)
"""In ``transformers.models.auto.modeling_auto``: model types with the names of their classes."""


def known_architectures() -> frozenset[str] | None:
    """Classes that transformers builds without remote code; None if it is not installed."""
    return _classes(_TABLES)


def causal_architectures() -> frozenset[str]:
    """Those of them that predict the next token."""
    return _classes(("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",)) or frozenset()


@functools.cache
def _classes(tables: tuple[str, ...]) -> frozenset[str] | None:
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "models" / "auto" / "modeling_auto.py"
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        target = getattr(node, "targets", [None])[0]
        if isinstance(node, ast.Assign) and isinstance(target, ast.Name) and target.id in tables:
            names.update(_strings(node.value))
    return frozenset(names)


def _strings(node: ast.expr) -> set[str]:
    found = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
    return {value for value in found if isinstance(value, str)}
