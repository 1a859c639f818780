"""PEFT adapters as planning sees them: config and headers, never weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merging.checkpoint.adapter_config import AdapterConfig, parse_adapter_config
from merging.checkpoint.header import read_header
from merging.checkpoint.index import (
    CheckpointIndex,
    TensorEntry,
    WeightFile,
    list_folder,
    read_checkpoint_index,
)
from merging.checkpoint.weight_files import INDEX_NAME, SINGLE_NAME, pickle_error
from merging.errors import CheckpointError
from merging.storage.base import ObjectStat, Storage

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLE_NAME = "adapter_model.bin"
_NAMES = frozenset({CONFIG_NAME, WEIGHTS_NAME, _PICKLE_NAME})

_MAX_CONFIG_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class AdapterIndex:
    """An adapter.

    Attributes:
        uri: Normalised address of its folder.
        config: What its config says.
        config_version: Pin of the config as it was read.
        files: Its weight file.
        tensors: Entries by name, in the order of the file.
    """

    uri: str
    config: AdapterConfig
    config_version: str
    files: tuple[WeightFile, ...]
    tensors: dict[str, TensorEntry]


def read_model_index(storage: Storage, uri: str) -> CheckpointIndex | AdapterIndex:
    """Read what a folder holds: a checkpoint, or an adapter.

    Raises:
        CheckpointError: It holds neither, both, or a damaged one.
        StorageError: It cannot be read.
    """
    uri = storage.normalise(uri)
    listing = list_folder(storage, uri)
    if _NAMES & listing.keys():
        return _read_adapter(storage, uri, listing)
    return read_checkpoint_index(storage, uri, listing)


def _read_adapter(storage: Storage, uri: str, listing: Mapping[str, ObjectStat]) -> AdapterIndex:
    beside = sorted({SINGLE_NAME, INDEX_NAME} & listing.keys())
    if beside:
        raise CheckpointError(
            f"{uri} holds an adapter and a whole model ({beside[0]}); which of them is meant cannot"
            " be told. Put the adapter into a folder of its own.",
            code="index_inconsistent",
            context={"uri": uri},
        )
    _check_files(uri, listing)
    stat = listing[CONFIG_NAME]
    if stat.size > _MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"{stat.uri} has {stat.size} bytes; at most {_MAX_CONFIG_BYTES} are read.",
            code="config_invalid",
            context={"uri": stat.uri},
        )
    data = storage.read_bytes(stat.uri, limit=_MAX_CONFIG_BYTES, version=stat.version)
    weights = listing[WEIGHTS_NAME]
    file = WeightFile(weights.uri, weights.size, weights.version)
    header = read_header(storage, file)
    return AdapterIndex(
        uri=uri,
        config=parse_adapter_config(data, stat.uri),
        config_version=stat.version,
        files=(file,),
        tensors={
            found.name: TensorEntry(found.name, found.dtype, found.shape, 0, found.start, found.end)
            for found in header.entries
        },
    )


def _check_files(uri: str, listing: Mapping[str, ObjectStat]) -> None:
    if WEIGHTS_NAME not in listing and _PICKLE_NAME in listing:
        raise pickle_error(uri, [_PICKLE_NAME], WEIGHTS_NAME)
    missing = sorted({CONFIG_NAME, WEIGHTS_NAME} - listing.keys())
    if missing:
        raise CheckpointError(
            f"{uri} holds an adapter that lacks {missing[0]}. Finish its download or upload.",
            code="missing_file",
            context={"uri": f"{uri}/{missing[0]}"},
        )
