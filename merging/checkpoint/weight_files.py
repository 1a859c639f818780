"""Which files of a folder are the weights of its model.

An index file decides where there is one. Without it ``model.safetensors`` does, and otherwise all
safetensors files of the folder together. Files in subfolders never count. What cannot be read
safely or is not a whole model is refused with what to do about it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from merging.checkpoint.documents import decode_members, shorten, shorten_all
from merging.checkpoint.header import MAX_TENSORS
from merging.errors import CheckpointError
from merging.storage.base import ObjectStat, Storage

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

WeightMap = dict[str, str]
"""Tensor name → file name."""

_MAX_INDEX_BYTES = 100_000_000  # as for headers; 90,000 tensors make 9 MB
_MAX_FILES = 10_000  # ten times the largest published checkpoints
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ADAPTER_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors"})
_NOT_A_MODEL = re.compile(r"(adapter|optimizer|scheduler|random_states|rng_state)")
_PLAIN = re.compile(r"[\w.-]+")
_NUMBERED = re.compile(r"(.*)-(\d{1,6})-of-(\d{1,6})\.safetensors")

_CONVERT = (
    'python -c "from transformers import AutoModelForCausalLM as M;'
    " M.from_pretrained('OLD', dtype='auto').save_pretrained('NEW', safe_serialization=True)\""
)
_CONVERT_FILE = (
    'python -c "import torch; from safetensors.torch import save_file;'
    " save_file(torch.load('{name}', map_location='cpu', weights_only=True), '{target}')\""
)
"""Of a file without a model around it; ``weights_only`` builds tensors and runs nothing."""


def find_weight_files(
    storage: Storage, uri: str, listing: Mapping[str, ObjectStat]
) -> tuple[list[str], WeightMap | None]:
    """Names of the weight files in sorted order, and the index's map if there is an index.

    Args:
        storage: Where the folder is.
        uri: Its normalised address.
        listing: What it holds, by name relative to ``uri``; not empty.

    Raises:
        CheckpointError: ``unsafe_format``, ``missing_file`` or ``index_inconsistent``.
    """
    adapter = sorted(_ADAPTER_FILES & listing.keys())
    if adapter:
        raise CheckpointError(
            f"{uri} holds an adapter ({adapter[0]}), not a whole model. Name it under 'models' of a"
            " recipe whose base_model is the model that it was trained on.",
            code="missing_file",
            context={"uri": uri},
        )
    if INDEX_NAME in listing:
        weight_map = _read_weight_map(storage, listing[INDEX_NAME])
        names = sorted(set(weight_map.values()))
        _check_present(uri, names, listing, weight_map)
        _check_single(uri, names, listing)
        return names, weight_map
    if SINGLE_NAME in listing:
        return [SINGLE_NAME], None
    names = sorted(name for name in listing if _is_weight_file(name))
    if not names:
        raise _nothing_found(uri, listing)
    _check_count(uri, names)
    _check_numbers(uri, names)
    return names, None


def _is_weight_file(name: str) -> bool:
    return "/" not in name and name.endswith(".safetensors") and not _NOT_A_MODEL.match(name)


def _read_weight_map(storage: Storage, stat: ObjectStat) -> WeightMap:
    if stat.size > _MAX_INDEX_BYTES:
        raise _inconsistent(
            stat.uri, f"has {stat.size} bytes; at most {_MAX_INDEX_BYTES} are read."
        )
    data = storage.read_bytes(stat.uri, limit=_MAX_INDEX_BYTES, version=stat.version)
    members = decode_members(
        data, msgspec.Raw, stat.uri, what="JSON", code="index_inconsistent", max_members=100
    )
    if "weight_map" not in members:
        raise _inconsistent(
            stat.uri, "has no weight_map, the object that gives the file of each tensor."
        )
    weight_map = decode_members(
        members["weight_map"],
        str,
        stat.uri,
        what="weight_map",
        code="index_inconsistent",
        max_members=MAX_TENSORS,
    )
    if not weight_map:
        raise _inconsistent(stat.uri, "names no tensors.")
    if pickles := sorted({name for name in weight_map.values() if is_pickle(name)}):
        raise pickle_error(stat.uri.rpartition("/")[0], pickles)
    for tensor, name in weight_map.items():
        if not _is_plain_file_name(name):
            raise _inconsistent(
                stat.uri,
                f"puts tensor {shorten(tensor)} into file {shorten(name)}. A file name that ends"
                " in .safetensors is expected, without folders.",
            )
    return weight_map


def _is_plain_file_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and name.isprintable()
        and not name.startswith(".")
        and not {"/", "\\", ":"} & set(name)
    )


def _check_present(
    uri: str, names: list[str], listing: Mapping[str, ObjectStat], weight_map: WeightMap
) -> None:
    _check_count(uri, names)
    missing = [name for name in names if name not in listing]
    if missing:
        lost = Counter(weight_map.values())
        raise CheckpointError(
            f"{uri} lacks {len(missing)} of the {len(names)} weight files that {INDEX_NAME} names:"
            f" {shorten_all(missing)}; they hold {sum(lost[name] for name in missing)} of its"
            f" {len(weight_map)} tensors. Finish the download or upload of the checkpoint.",
            code="missing_file",
            context={"uri": f"{uri}/{missing[0]}"},
        )


def _check_single(uri: str, names: list[str], listing: Mapping[str, ObjectStat]) -> None:
    """A whole model beside an index that does not know it: readers disagree on which counts."""
    if SINGLE_NAME in listing and SINGLE_NAME not in names:
        raise _inconsistent(
            f"{uri}/{INDEX_NAME}",
            f"names other files than {SINGLE_NAME}, which is there too. Remove whichever of the"
            " two models is stale.",
        )


def _check_count(uri: str, names: list[str]) -> None:
    if len(names) > _MAX_FILES:
        raise _inconsistent(uri, f"has {len(names)} weight files; at most {_MAX_FILES} are read.")


def _check_numbers(uri: str, names: Iterable[str]) -> None:
    """Without an index, numbered files say how many there should be."""
    found: dict[tuple[str, int], set[int]] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match:
            found.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, total), numbers in found.items():
        if numbers not in (set(range(1, total + 1)), set(range(total))):
            raise CheckpointError(
                f"{uri} holds {len(numbers)} of the {total} weight files {shorten(stem)}-…-of-"
                f"{total}.safetensors and no {INDEX_NAME}. Finish the download or upload of the"
                " checkpoint, or remove the files if they are stale.",
                code="missing_file",
                context={"uri": uri},
            )


def _nothing_found(uri: str, listing: Mapping[str, ObjectStat]) -> CheckpointError:
    if pickles := sorted(name for name in listing if is_pickle(name)):
        return pickle_error(uri, pickles)
    return CheckpointError(
        f"{uri} holds no weights: expected {SINGLE_NAME}, or {INDEX_NAME} with its files. It holds"
        f" {shorten_all(sorted(listing))}.",
        code="missing_file",
        context={"uri": uri},
    )


def is_pickle(name: str) -> bool:
    """Whether a file, by its name, holds pickled weights, or is the index of such files."""
    return name.removesuffix(".index.json").endswith(_PICKLE_SUFFIXES)


def pickle_error(uri: str, names: Sequence[str], target: str | None = None) -> CheckpointError:
    """The refusal of pickled weights, with the safe way to convert them.

    Args:
        uri: Address of the model.
        names: Of its files.
        target: What a file becomes that is not loaded as a whole model.
    """
    is_model = any(name.startswith("pytorch_model") for name in names)
    if is_model and target is None:
        advice = f"convert them once: {_CONVERT}"
    else:
        name = names[0] if _PLAIN.fullmatch(names[0]) else "OLD"  # it goes into a shell
        told = {"name": name, "target": target or SINGLE_NAME}
        advice = f"convert them once, in their folder: {_CONVERT_FILE.format(**told)}"
    return CheckpointError(
        f"{uri} has its weights as pickle files ({shorten_all(names)}), which can run code when"
        f" they are read; they never are. Where you trust them, {advice}",
        code="unsafe_format",
        context={"uri": uri},
    )


def _inconsistent(uri: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{uri} {reason}", code="index_inconsistent", context={"uri": uri})
