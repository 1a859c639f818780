"""The output's ``config.json``: the donor's, with what the merge changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from merging.dtypes import is_float, recipe_name
from merging.plan.inputs import Inputs
from merging.plan.packing import data_bytes
from merging.plan.plan import Problem

_DTYPE_KEYS = ("dtype", "torch_dtype")

_NUM_LAYERS_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What models call the number of their layers; a config has one of them, or the same in several."""

_LAYER_LIST_KEYS = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers")
"""Lists with an item for each layer."""

_TEXT_CONFIG = "text_config"


def output_config(inputs: Inputs, problems: Sequence[Problem]) -> dict[str, Any]:
    """The donor's config with the type that most of the output's bytes have.

    With slices, also with the number of layers, and where a list has an item for each layer, with
    those of the layers that the first source of each slice has.
    """
    sizes = Counter[str]()
    for problem in problems:
        if is_float(problem.dtype):
            sizes[problem.dtype] += data_bytes(problem)
    name = recipe_name(max(sorted(sizes), key=sizes.__getitem__))
    config = _with_dtype(inputs.donor.config, name)
    return _with_layers(config, inputs) if inputs.slices else config


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A copy in which every key that states a type states this one, in parts of the model too."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in _DTYPE_KEYS and isinstance(value, str):
            changed[key] = name
        elif key.endswith("_config") and isinstance(value, dict):
            changed[key] = _with_dtype(value, name)
        else:
            changed[key] = value
    return changed


def _with_layers(config: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
    """A copy with what it says of the layers."""
    inner = config.get(_TEXT_CONFIG)
    if isinstance(inner, dict):
        config = {**config, _TEXT_CONFIG: _with_layers(inner, inputs)}
    changed = dict.fromkeys((k for k in _NUM_LAYERS_KEYS if k in config), inputs.num_layers)
    lists = {key: _layer_list(key, inputs) for key in _LAYER_LIST_KEYS if key in config}
    return {**config, **changed, **{key: value for key, value in lists.items() if value}}


def _layer_list(key: str, inputs: Inputs) -> list[Any] | None:
    """The items of a list for the layers of the output; None where a donor has no such list."""
    items: list[Any] = []
    for one in inputs.slices:
        config = one.donor.config
        inner = config.get(_TEXT_CONFIG)
        found = (inner if isinstance(inner, dict) else config).get(key)
        start, end = one.layer_range
        if not isinstance(found, list) or len(found) < end:
            return None
        items += found[start:end]
    return items
