"""Recipes that mergekit and this project both merge, and how near the results have to be.

Models are written as ``BASE``, ``E0``, ``E1``, ``E2``, and ``V0``, ``V1``, ``V2`` with
vocabularies of their own; ``T0``, ``T1``, ``T2`` are T5. Everything is in float32: mergekit
computes in the type of its inputs, and only there does it say what a method is to the last digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BITS = 0.0
"""Elementwise in the same order: the same bits."""

ROUNDING = 2e-6
"""Of the change that a merge makes: sums in another order, angles in float64 instead of float32."""


@dataclass(frozen=True)
class Case:
    """One recipe.

    Attributes:
        name: What it is about.
        recipe: In the common schema.
        tolerance: Largest ‖ours − theirs‖ / ‖theirs − base‖ of any tensor, beyond the rounding of
            its entries in float32.
        by_token: Rows of embeddings and heads are compared token by token: mergekit numbers the
            tokens that a union adds in no order.
        flipped: Share of entries that may differ by more, where a method chooses entries by a
            threshold and rounding decides single ones.
        call: What the other side does where it knows no recipes.
        task: Number of the task whose own model is compared, made of the merge but not rescaled.
    """

    name: str
    recipe: dict[str, Any]
    tolerance: float = BITS
    flipped: float = 0.0
    by_token: bool = False
    call: dict[str, Any] | None = None
    task: int | None = None


def _models(*parameters: dict[str, Any], base: bool = False) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = [{"model": "BASE"}] if base else []
    for number, one in enumerate(parameters):
        listed.append({"model": f"E{number}", **({"parameters": one} if one else {})})
    return listed


def _recipe(
    method: str, models: list[dict[str, Any]], *, base: bool = True, **parameters: Any
) -> dict[str, Any]:
    recipe: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "float32"}
    if base:
        recipe["base_model"] = "BASE"
    if parameters:
        recipe["parameters"] = parameters
    return recipe


WEIGHTS = ({"weight": 0.3}, {"weight": 0.9}, {"weight": 0.5})
SPARSE = tuple(
    {**one, "density": density} for one, density in zip(WEIGHTS, (0.5, 0.3, 1.0), strict=True)
)
CRUMBS = tuple({**one, "gamma": 0.05} for one in SPARSE)
FILTERED = [{"filter": "mlp", "value": 0.2}, {"filter": "self_attn", "value": 1.0}, {"value": 0.6}]


def _slice(*sources: tuple[str, int, dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """One layer of each source, with parameters."""
    entries = [
        {"model": model, "layer_range": [layer, layer + 1], "parameters": parameters}
        for model, layer, parameters in sources
    ]
    return {"sources": entries, **changes}


def _sliced(method: str, *slices: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"merge_method": method, "slices": list(slices), "dtype": "float32", **changes}


def _t5(**modules: Any) -> dict[str, Any]:
    """An encoder and a decoder merged in different ways."""
    return {
        "merge_method": "task_arithmetic",
        "base_model": "T0",
        "dtype": "float32",
        "parameters": {"weight": 0.5, "lambda": 0.8},
        "modules": modules,
    }


def _adapted(adapter: str) -> dict[str, Any]:
    return {"model": {"model": {"path": "BASE"}, "lora": {"path": adapter}}}


def _mistral(model: Any) -> dict[str, Any]:
    return {"model": model, "lora": None, "override_architecture": "MistralForCausalLM"}


VOCABULARIES = (
    (["<unk>", "<s>", *"abcdefgh"], ["</s>"]),
    (["<unk>", "<s>", *"hgfedcba", "x"], ["</s>", "<|end|>"]),
    (["<unk>", *"abcd", "<s>", "x", "y"], ["<|end|>"]),
)
"""Words and special tokens of the models with vocabularies of their own."""

_CHOICES = {
    "x": {"source": {"kind": "zero"}},
    "y": {"source": "V2", "force": True},
    "h": {"source": {"kind": "model_token", "model": "V1", "token": "a"}},
    "g": {"source": {"kind": "model_token", "model": "V0", "token_id": 2}, "force": True},
    "new": {"source": {"kind": "zero"}},
}


def _vocabularies(**changes: Any) -> dict[str, Any]:
    """A sum of models with vocabularies of their own."""
    models = [{"model": f"V{n}", "parameters": {"weight": 0.25 * 2**n}} for n in range(3)]
    return {
        "merge_method": "linear",
        "models": models,
        "dtype": "float32",
        "parameters": {"normalize": False},
        **changes,
    }


CASES = [
    Case("linear", _recipe("linear", _models(*WEIGHTS), base=False), ROUNDING),
    Case(
        "linear, sum", _recipe("linear", _models(*WEIGHTS), base=False, normalize=False), ROUNDING
    ),
    Case(
        "linear, base listed",
        _recipe(
            "linear",
            [{"model": "BASE", "parameters": {"weight": 1.0}}, *_models(*WEIGHTS)],
            base=False,
        ),
        ROUNDING,
    ),
    Case("task_arithmetic", _recipe("task_arithmetic", _models(*WEIGHTS))),
    Case(
        "task_arithmetic, lambda", _recipe("task_arithmetic", _models(*WEIGHTS), **{"lambda": 0.7})
    ),
    Case("task_arithmetic, mean", _recipe("task_arithmetic", _models(*WEIGHTS), normalize=True)),
    Case(
        "weights by filter",
        _recipe("task_arithmetic", _models({"weight": FILTERED}, {"weight": 0.5})),
    ),
    Case(
        "weights by layer",
        _recipe("task_arithmetic", _models({"weight": [0.0, 1.0]}, {"weight": [1.0, 0.5, 0.0]})),
    ),
    Case("base listed with weight", _recipe("task_arithmetic", _models(*WEIGHTS, base=True))),
    Case(
        "models as mappings, taken for another class",
        _recipe(
            "task_arithmetic",
            [
                {"model": _mistral({"path": "E0"}), "parameters": {"weight": 0.3}},
                {"model": _mistral("E1")},
            ],
            weight=0.9,
        )
        | {"base_model": _mistral({"path": "BASE", "revision": None})},
    ),
    Case(
        "adapters",
        _recipe("task_arithmetic", [_adapted("A0"), _adapted("A1")], weight=0.7),
        ROUNDING,
    ),
    Case(
        "a base model with an adapter",
        _recipe("task_arithmetic", _models(*WEIGHTS)) | {"base_model": _adapted("A0")["model"]},
        ROUNDING,
    ),
    Case("ties", _recipe("ties", _models(*SPARSE))),
    Case("ties, rescaled", _recipe("ties", _models(*SPARSE), rescale=True), ROUNDING),
    Case(
        "task_arithmetic, density and rescale",
        _recipe("task_arithmetic", _models(*SPARSE), rescale=True),
    ),
    Case("ties, sum", _recipe("ties", _models(*SPARSE), normalize=False)),
    Case(
        "ties, density by filter",
        _recipe(
            "ties",
            _models(
                *(
                    {"weight": 1.0, "density": [{"filter": "mlp", "value": 0.4}, {"value": 0.8}]}
                    for _ in range(3)
                )
            ),
        ),
    ),
    Case("breadcrumbs", _recipe("breadcrumbs", _models(*CRUMBS))),
    Case("breadcrumbs, rescaled", _recipe("breadcrumbs", _models(*CRUMBS), rescale=True), ROUNDING),
    Case("breadcrumbs_ties", _recipe("breadcrumbs_ties", _models(*CRUMBS))),
    Case("sce", _recipe("sce", _models({}, {}, {})), ROUNDING),
    Case(
        "sce, a third",
        _recipe("sce", _models({}, {}, {}), select_topk=0.33),
        ROUNDING,
        flipped=1e-3,
    ),
    Case("slerp", _recipe("slerp", _models({}, base=True), t=0.3), 1e-5),
    Case(
        "slerp by layer and filter",
        _recipe(
            "slerp",
            _models({}, base=True),
            t=[{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.5}],
        ),
        1e-4,
    ),
    Case("nuslerp", _recipe("nuslerp", _models(*WEIGHTS[:2]), base=False), 1e-5),
    Case("nuslerp, task vectors", _recipe("nuslerp", _models(*WEIGHTS[:2])), 1e-5),
    Case("nuslerp, rows", _recipe("nuslerp", _models(*WEIGHTS[:2]), nuslerp_flatten=False), 1e-5),
    Case("multislerp", _recipe("multislerp", _models(*WEIGHTS), base=False), 1e-5),
    Case("multislerp, task vectors", _recipe("multislerp", _models(*WEIGHTS)), 1e-5),
    Case("karcher", _recipe("karcher", _models({}, {}, {}), base=False), 1e-4),
    Case("model_stock", _recipe("model_stock", _models({}, {}, {})), 1e-5),
    Case("model_stock, rows", _recipe("model_stock", _models({}, {}, {}), filter_wise=True), 1e-5),
    Case("nearswap", _recipe("nearswap", _models({}), t=1e-4), 1e-5),
    Case("arcee_fusion", _recipe("arcee_fusion", _models({})), ROUNDING, flipped=2e-2),
    Case("ram", _recipe("ram", _models({}, {}, {})), ROUNDING),
    Case("ramplus_tl", _recipe("ramplus_tl", _models({}, {}, {})), 1e-5),
    Case("passthrough", _recipe("passthrough", _models({}), base=False)),
    Case("passthrough, scaled", _recipe("passthrough", _models({"scale": 0.5}), base=False)),
    Case(
        "slices, layers exchanged",
        _sliced(
            "passthrough",
            _slice(("E0", 1, {"scale": [{"filter": "layers.1.mlp", "value": 0.5}, {"value": 1}]})),
            _slice(("E1", 0, {})),
        ),
    ),
    Case(
        "slices, precedence and bases of their own",
        _sliced(
            "task_arithmetic",
            _slice(
                ("BASE", 0, {}),
                ("E0", 0, {"weight": [0.2, 0.7]}),
                ("E1", 1, {}),
                parameters={"weight": 0.4, "lambda": 0.9},
            ),
            _slice(("E0", 1, {}), ("E1", 1, {}), ("E2", 0, {}), base_model="E0"),
            base_model="BASE",
            parameters={"weight": 0.6},
        ),
    ),
    Case(
        "slices, slerp by filter and layer",
        _sliced(
            "slerp",
            {
                "sources": [
                    {"model": "BASE", "layer_range": [0, 2]},
                    {"model": "E0", "layer_range": [0, 2]},
                ]
            },
            base_model="BASE",
            parameters={"t": [{"filter": "self_attn", "value": [0.1, 0.9]}, {"value": 0.5}]},
        ),
        1e-4,
    ),
    Case(
        "modules, with parameters of their own",
        _t5(
            encoder={
                "models": [{"model": "T1", "parameters": {"weight": [0.1, 0.9]}}, {"model": "T2"}],
                "parameters": {"weight": [{"filter": "SelfAttention", "value": 0.3}, {"value": 1}]},
            },
            decoder={"models": [{"model": "T2"}], "parameters": {"lambda": 0.5}},
            shared={"models": [{"model": "T1"}, {"model": "T2"}]},
        ),
    ),
    Case(
        "modules, one in slices",
        _t5(
            encoder={
                "slices": [
                    _slice(("T0", 0, {}), ("T1", 0, {"weight": 0.2}), parameters={"weight": 0.7}),
                    _slice(("T0", 1, {}), ("T2", 1, {})),
                ],
                "parameters": {"weight": 0.4},
            },
            decoder={"models": [{"model": "T1"}]},
            shared={"models": [{"model": "T2"}]},
        ),
    ),
    Case(
        "documents that refer to each other",
        {
            "documents": [
                {
                    "merge_method": "slerp",
                    "base_model": "left",
                    "models": [{"model": "left"}, {"model": "right"}],
                    "parameters": {"t": 0.4},
                    "dtype": "float32",
                },
                {"name": "left", **_recipe("ties", _models(*SPARSE))},
                {"name": "right", **_recipe("task_arithmetic", _models(*WEIGHTS[:2]))},
            ]
        },
        1e-4,
    ),
    *(
        Case(f"vocabularies, {name}", _vocabularies(**changes), tolerance, by_token=True)
        for name, tolerance, changes in (
            ("base", BITS, {"base_model": "V0", "tokenizer_source": "base"}),
            ("union with a base", BITS, {"base_model": "V0", "tokenizer_source": "union"}),
            ("of a model", BITS, {"base_model": "V0", "tokenizer_source": "V2"}),
            ("union, means", ROUNDING, {"base_model": "V2", "tokenizer_source": "union"}),
            ("choices", BITS, {"base_model": "V0", "tokenizer": {"tokens": _CHOICES}}),
            (
                "padded",
                ROUNDING,
                {"base_model": "V0", "tokenizer": {"source": "base", "pad_to_multiple_of": 8}},
            ),
        )
    ),
]
