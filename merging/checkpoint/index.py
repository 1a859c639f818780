"""The checkpoint index: what is known of a checkpoint without reading its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from merging.checkpoint.companions import is_companion
from merging.checkpoint.documents import parse_config, shorten, shorten_all
from merging.checkpoint.header import Header, read_header
from merging.checkpoint.weight_files import (
    INDEX_NAME,
    WeightMap,
    find_weight_files,
    is_pickle,
    pickle_error,
)
from merging.errors import CheckpointError, StorageError
from merging.storage.base import ObjectStat, Storage

CONFIG_NAME = "config.json"

_MAX_CONFIG_BYTES = 4 << 20  # the longest, with tables of 20,000 class labels, have 2 MB
_HEADER_THREADS = 16  # object storage takes tens of milliseconds to answer each request


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        name: Fully qualified name.
        dtype: safetensors dtype name (``BF16``).
        shape: Sizes; empty for a scalar.
        file: Index into :attr:`CheckpointIndex.files`.
        start: Absolute offset of the first byte in the file.
        end: Absolute offset after the last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One ``.safetensors`` file of an input checkpoint, pinned to the version seen."""

    uri: str
    size: int
    version: str


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """A checkpoint as planning sees it.

    Attributes:
        uri: Normalised address of its folder.
        config: Parsed ``config.json`` ({} when there is none).
        files: Its weight files, in the order of their names.
        tensors: Entries by name, in file order and then offset order.
        companions: Names of the other files beside the weights (tokenizer, chat template …),
            relative to ``uri``, with their versions.
        metadata: ``__metadata__`` of the first weight file.
    """

    uri: str
    config: dict[str, Any]
    files: tuple[WeightFile, ...]
    tensors: dict[str, TensorEntry]
    companions: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def read_checkpoint_index(
    storage: Storage, uri: str, listing: dict[str, ObjectStat] | None = None
) -> CheckpointIndex:
    """Read config, index and headers of a checkpoint; never weights.

    Args:
        storage: Where it is.
        uri: Address of its folder.
        listing: What :func:`list_folder` found there; None lists it.

    Raises:
        CheckpointError: The folder holds no safetensors checkpoint, or a damaged one.
        StorageError: It cannot be read.
    """
    uri = storage.normalise(uri)
    listing = list_folder(storage, uri) if listing is None else listing
    names, weight_map = find_weight_files(storage, uri, listing)
    files = tuple(WeightFile(f.uri, f.size, f.version) for f in (listing[n] for n in names))
    with ThreadPoolExecutor(min(_HEADER_THREADS, len(files))) as pool:
        headers = list(pool.map(partial(read_header, storage), files))
    tensors = _join_headers(files, headers)
    if weight_map is not None:
        _check_weight_map(uri, names, headers, weight_map)
    return CheckpointIndex(
        uri=uri,
        config=_read_config(storage, listing.get(CONFIG_NAME)),
        files=files,
        tensors=tensors,
        companions={name: stat.version for name, stat in listing.items() if is_companion(name)},
        metadata=headers[0].metadata,
    )


def checkpoint_digest(uri: str, files: Sequence[WeightFile]) -> str:
    """``sha256:…`` over names, sizes and versions of the weight files (not over the weights).

    Args:
        uri: Address of the folder.
        files: All of them.
    """
    digest = hashlib.sha256()
    for file in files:
        name = file.uri[len(uri) + 1 :]
        digest.update(f"{name}\n{file.size}\n{file.version}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def list_folder(storage: Storage, uri: str) -> dict[str, ObjectStat]:
    """What a model's folder holds, by name relative to it.

    Raises:
        StorageError: ``not_found``: it holds nothing; or it cannot be read.
        CheckpointError: ``unsafe_format``: it is a file of pickled weights.
    """
    start = len(uri.rstrip("/")) + 1
    listing = {stat.uri[start:]: stat for stat in storage.list(uri)}
    if not listing:
        found_file = is_file(storage, uri)
        if found_file and is_pickle(uri):
            folder, _, name = uri.rpartition("/")
            raise pickle_error(folder, [name])
        found = f"{uri} is a file" if found_file else f"There is nothing at {uri}"
        revision = (
            " A revision, NAME@REVISION, has to lie in a folder of that whole name: hf download"
            " NAME --revision REVISION --local-dir NAME@REVISION."
        )
        raise StorageError(
            f"{found}. A checkpoint is a folder, or an s3:// prefix, that holds"
            f" config.json and model.safetensors or {INDEX_NAME} with its files. Models of the"
            f" Hugging Face hub must be downloaded first.{revision if '@' in uri else ''}",
            code="not_found",
            context={"uri": uri},
        )
    return listing


def is_file(storage: Storage, uri: str) -> bool:
    """Whether an address is that of a file."""
    try:
        storage.stat(uri)
    except StorageError:
        return False
    return True


def _join_headers(files: tuple[WeightFile, ...], headers: list[Header]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for number, header in enumerate(headers):
        for found in header.entries:
            entry = TensorEntry(
                found.name, found.dtype, found.shape, number, found.start, found.end
            )
            other = tensors.setdefault(found.name, entry)
            if other is not entry:
                raise CheckpointError(
                    f"Tensor {shorten(found.name)} is in two files, {files[other.file].uri} and"
                    f" {files[number].uri}, and nothing says which counts. Remove the file that"
                    " does not belong to the model.",
                    code="index_inconsistent",
                    context={"uri": files[number].uri, "tensor_name": found.name},
                )
    return tensors


def _check_weight_map(
    uri: str, names: list[str], headers: list[Header], weight_map: WeightMap
) -> None:
    """The index and the headers must say the same about which tensor is in which file."""
    there = {
        (entry.name, name)
        for name, header in zip(names, headers, strict=True)
        for entry in header.entries
    }
    faults = []
    for wrong, text in (
        (weight_map.items() - there, "in the index but not in the file it names"),
        (there - weight_map.items(), "in a file but not so in the index"),
    ):
        if wrong:
            shown = shorten_all(sorted(tensor for tensor, _ in wrong))
            faults.append(f"{len(wrong)} tensors are {text}: {shown}")
    if faults:
        raise CheckpointError(
            f"{uri}/{INDEX_NAME} does not describe its weight files. {'. '.join(faults)}."
            " The files are of different versions, or one is damaged: copy the checkpoint again.",
            code="index_inconsistent",
            context={"uri": f"{uri}/{INDEX_NAME}"},
        )


def _read_config(storage: Storage, stat: ObjectStat | None) -> dict[str, Any]:
    if stat is None:
        return {}
    if stat.size > _MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"{stat.uri} has {stat.size} bytes; at most {_MAX_CONFIG_BYTES} are read.",
            code="config_invalid",
            context={"uri": stat.uri},
        )
    data = storage.read_bytes(stat.uri, limit=_MAX_CONFIG_BYTES, version=stat.version)
    return parse_config(data, stat.uri)
