"""Which experts can be run block by block, and what a block is, from config and headers."""

from __future__ import annotations

import re

from merging.checkpoint.index import CheckpointIndex, TensorEntry
from merging.dtypes import is_float
from merging.errors import Fault
from merging.plan.architectures import known_architectures
from merging.plan.images import is_vision, num_places
from merging.plan.inputs import Expert
from merging.plan.wording import shorten_list
from merging.roles import Role, describe_tensor

_BEFORE_BLOCKS = frozenset({"embedding", "position", "conv"})
_BEFORE_NAMES = re.compile(r"embed|(^|\.)(pre_lay\w*norm|ln_pre|norm_pre)\.")
"""Of other tensors there; what the worker finds missing it refuses to do without."""
_WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "dim")


def unfit(expert: Expert) -> list[Fault]:
    """Why an expert cannot be run block by block, if it cannot."""
    index, pointer = expert.index, expert.pointer

    def refuse(detail: str) -> list[Fault]:
        return [Fault(pointer, "incompatible_options", f"{index.uri} {detail}")]

    if expert.adapter is not None:
        return refuse("is merged as an adapter; calibrated methods run whole models: merge it"
                      " into its base first.")  # fmt: skip
    known = known_architectures()
    if known is None:
        return refuse("is to be run on samples, for which transformers and accelerate must be"
                      " installed: pip install 'mergeyard[calibration]'.")  # fmt: skip
    name = architecture(index)
    if name not in known:
        needs = " without remote code" if index.config.get("auto_map") else ""
        return refuse(
            f"has the architecture {name or 'none'!r} in its config.json, which the installed"
            f" transformers cannot build{needs}; calibrated methods have to run it."
        )
    if index.config.get("is_encoder_decoder"):
        return refuse("has an encoder and a decoder; models with one stack of blocks are run.")
    stacks = stacks_of(index)
    if len(stacks) != 1:
        told = shorten_list(sorted(stacks)) if stacks else "none"
        return refuse(f"has not one stack of blocks by its tensors' names ({told}).")
    if is_vision(index.config) and num_places(index) is None:
        return refuse("sees images, and has no tensor of positions that tells how many hidden"
                      " states there are of one.")  # fmt: skip
    if hidden_width(index) is None:
        return refuse(f"has none of {', '.join(_WIDTH_KEYS)} in its config.json.")
    return []


def architecture(index: CheckpointIndex) -> str:
    """The model's class in transformers; "" if the config names none."""
    names = index.config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def hidden_width(index: CheckpointIndex) -> int | None:
    """Entries of a hidden state; None if the config does not say."""
    found = (index.config.get(key) for key in _WIDTH_KEYS)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def role_of(index: CheckpointIndex, entry: TensorEntry) -> Role:
    """What one of a checkpoint's tensors is for."""
    return describe_tensor(entry.name, entry.shape, index.config)


def stacks_of(index: CheckpointIndex) -> dict[str, set[int]]:
    """Lists of blocks, with the numbers of those."""
    stacks: dict[str, set[int]] = {}
    for entry in index.tensors.values():
        layer = role_of(index, entry).layer
        if layer >= 0:
            stack = f".{entry.name}".partition(f".{layer}.")[0].removeprefix(".")
            stacks.setdefault(stack, set()).add(layer)
    return stacks


def split_by_block(index: CheckpointIndex, num_blocks: int) -> dict[int, list[TensorEntry]]:
    """Tensors by the block with which they are run: -1 is what stands before all.

    What stands behind is run with the last one, but for the head, which no statistics need.
    """
    parts: dict[int, list[TensorEntry]] = {block: [] for block in range(-1, num_blocks)}
    for entry in index.tensors.values():
        role = role_of(index, entry)
        if not is_float(entry.dtype):
            continue
        if role.layer >= 0:
            parts[role.layer].append(entry)
        elif role.kind in _BEFORE_BLOCKS or _BEFORE_NAMES.search(entry.name):
            parts[-1].append(entry)
        elif not is_of_head(index, entry):
            parts[num_blocks - 1].append(entry)
    return parts


def is_of_head(index: CheckpointIndex, entry: TensorEntry) -> bool:
    """Whether it is the head, or a bias beside its weight."""
    weight = index.tensors.get(entry.name.removesuffix("bias") + "weight")
    return any(role_of(index, one).kind == "head" for one in (entry, weight) if one is not None)
