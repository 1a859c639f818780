"""Recipes beside what FusionBench does to the same models, and how near the results have to be.

As in :mod:`tests.parity.cases`, everything is in float32.
"""

from __future__ import annotations

from typing import Any

from tests.parity.cases import BITS, ROUNDING, Case

SPECTRAL = 1e-4
"""Singular vectors in float32, by other decompositions."""

CLOSE = 5e-3
"""Singular values so close that the rounding of merged weights to float32 turns their vectors."""


def _case(
    method: str,
    call: dict[str, Any],
    tolerance: float,
    *,
    name: str = "",
    experts: dict[str, Any] | None = None,
    flipped: float = 0.0,
    task: int | None = None,
    **parameters: Any,
) -> Case:
    models = [{"model": f"E{number}", "parameters": experts or {}} for number in range(3)]
    recipe = {
        "merge_method": method,
        "base_model": "BASE",
        "models": models,
        "parameters": parameters,
        "dtype": "float32",
    }
    return Case(name or method, recipe, tolerance, flipped, call=call, task=task)


CASES = [
    _case(
        "wudi",
        {"function": "wudi", "iter_num": 300},
        1e-5,
        learning_rate=1e-5,
        steps=300,
        rest="mean",
    ),
    _case("tsv_m", {"function": "tsv_m"}, SPECTRAL),
    _case("iso_c", {"function": "iso_c"}, SPECTRAL, scale=1.0),
    _case(
        "iso_cts",
        {"function": "iso_cts", "common_space_fraction": 0.8},
        SPECTRAL,
        scale=1.0,
        common_space_fraction=0.8,
    ),
    _case(
        "ties",
        {"function": "ties", "percent": 20, "merge_func": "mean"},
        BITS,
        name="ties, whole model",
        experts={"density": 0.2},
        scope="global",
    ),
    _case(
        "consensus_ta",
        {"function": "consensus", "tall_mask_lambda": 0.4, "min_tasks": 2},
        BITS,
    ),
    _case(
        "consensus_ties",
        {"function": "consensus", "tall_mask_lambda": 0.4, "min_tasks": 2, "percent": 20},
        BITS,
    ),
    _case(
        "knots_ties",
        {"function": "knots_ties", "percent": 20},
        SPECTRAL,
        experts={"density": 0.2},
        flipped=1e-2,
    ),
    _case("emr", {"function": "emr", "task": None}, BITS, name="emr, the shared model"),
    *(
        _case("emr", {"function": "emr", "task": n}, ROUNDING, name=f"emr, task {n}", task=n)
        for n in range(3)
    ),
    _case("opcm", {"function": "opcm", "alpha": 0.5}, SPECTRAL),
    _case("doge", {"function": "doge", "subspace": 6, "percent": 30, "eta": 0.07}, SPECTRAL),
    _case(
        "task_arithmetic",
        {"function": "svc", "merged_by": {"function": "task_sum"}, "alpha": 0.1},
        SPECTRAL,
        name="task_arithmetic, svc",
        svc=0.1,
    ),
    _case(
        "tsv_m",
        {"function": "svc", "merged_by": {"function": "tsv_m"}, "alpha": 1.0},
        CLOSE,
        name="tsv_m, svc",
        svc=1.0,
    ),
]
