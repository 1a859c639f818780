"""The checkpoint index: what is known of a checkpoint without reading its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from merging.storage.base import Storage


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


def read_checkpoint_index(storage: Storage, uri: str) -> CheckpointIndex:
    """Read config, index and headers of a checkpoint; never weights.

    Raises:
        CheckpointError: The folder holds no safetensors checkpoint, or a damaged one.
        StorageError: It cannot be read.
    """
    raise NotImplementedError
