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


_PARTS = {
    "vision_tower": ("vision_config", (*_NUM_LAYERS_KEYS, "depth")),
    "vision_model": ("vision_config", (*_NUM_LAYERS_KEYS, "depth")),
    "audio_tower": ("audio_config", _NUM_LAYERS_KEYS),
    "encoder": ("encoder", ("encoder_layers", "num_layers", "num_hidden_layers")),
    "decoder": ("decoder", ("decoder_layers", "num_decoder_layers")),
}
"""Of modules: the part of a config that is about them, and what the number of layers is called.

Where there is no such part the whole config may be: encoders and decoders of T5, BART and kin.
"""


def output_config(
    inputs: Inputs, problems: Sequence[Problem], warnings: list[str]
) -> dict[str, Any]:
    """The donor's config with the type that most of the output's bytes have.

    With slices, also with the number of layers, and where a list has an item for each layer, with
    those of the layers that the first source of each slice has.

    Args:
        inputs: The checkpoints.
        problems: The output's.
        warnings: A number of layers that has no known place is told here.
    """
    sizes = Counter[str]()
    for problem in problems:
        if is_float(problem.dtype):
            sizes[problem.dtype] += data_bytes(problem)
    name = recipe_name(max(sorted(sizes), key=sizes.__getitem__))
    config = _with_dtype(inputs.donor.config, name)
    for module in dict.fromkeys(one.module for one in inputs.slices if one.is_sliced):
        slices = [one for one in inputs.slices if one.module == module]
        changed = _with_module(config, module, slices)
        if changed is None:
            warnings.append(
                f"The number of layers of the module {module!r} has no known place in config.json,"
                " which is that of the base or first model: see whether it is right."
            )
        config = changed or config
    return config


def _with_module(
    config: dict[str, Any], module: str, slices: Sequence[Inputs]
) -> dict[str, Any] | None:
    """A copy with the layers of a module; None if it is not known where they are told."""
    if module in ("", "default", "text_decoder"):
        return _with_layers(config, slices)
    part, keys = _PARTS.get(module, ("", ()))
    inner = config.get(part)
    if isinstance(inner, dict):
        found = _with_number(inner, slices, (*keys, *_NUM_LAYERS_KEYS))
        return found and {**config, part: found}
    return None if part.endswith("_config") else _with_number(config, slices, keys)


def _with_number(
    config: dict[str, Any], slices: Sequence[Inputs], keys: Sequence[str]
) -> dict[str, Any] | None:
    known = [key for key in keys if key in config]
    number = sum(end - start for start, end in (one.layer_range for one in slices))
    return {**config, **dict.fromkeys(known, number)} if known else None


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


def _with_layers(config: dict[str, Any], slices: Sequence[Inputs]) -> dict[str, Any]:
    """A copy with what it says of the layers."""
    inner = config.get(_TEXT_CONFIG)
    if isinstance(inner, dict):
        config = {**config, _TEXT_CONFIG: _with_layers(inner, slices)}
    config = _with_number(config, slices, _NUM_LAYERS_KEYS) or config
    lists = {key: _layer_list(key, slices) for key in _LAYER_LIST_KEYS if key in config}
    return {**config, **{key: value for key, value in lists.items() if value}}


def _layer_list(key: str, slices: Sequence[Inputs]) -> list[Any] | None:
    """The items of a list for the layers of the output; None where a donor has no such list."""
    items: list[Any] = []
    for one in slices:
        config = one.donor.config
        inner = config.get(_TEXT_CONFIG)
        found = (inner if isinstance(inner, dict) else config).get(key)
        start, end = one.layer_range
        if not isinstance(found, list) or len(found) < end:
            return None
        items += found[start:end]
    return items
