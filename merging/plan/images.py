"""The images that a vision model is run on: as its own processor makes them, in a safetensors file.

What a processor does with an image (size, crop, mean, scale) decides what a model sees, so that it
is not done again here: the file holds the numbers that go into the model, ``pixel_values``, images
× channels × rows × columns.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from merging.checkpoint.header import HeaderEntry, read_header
from merging.checkpoint.index import CheckpointIndex
from merging.errors import Fault, RecipeError
from merging.plan.samples import MAX_DATA_BYTES
from merging.plan.wording import shorten_list
from merging.recipe.calibration import CalibrationSettings
from merging.roles import describe_tensor
from merging.storage.base import ObjectStat, Storage

PIXELS = "pixel_values"
"""Name of the tensor, unless the recipe says another, and of the model's argument."""

_DTYPES = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class Images:
    """The images of one expert; as :class:`merging.plan.samples.Samples`.

    Attributes:
        settings: What the recipe says of them.
        file: Where they are.
        count: How many are used.
        length: Hidden states of an image.
        shape: Of an image: channels, rows, columns.
        start: Of their bytes in the file.
        end: Behind the last one.
        dtype: safetensors dtype.
        digest: ``sha256:…`` of type, shape and bytes.
        needs_tokenizer: They need none.
    """

    settings: CalibrationSettings
    file: ObjectStat
    count: int
    length: int
    shape: tuple[int, ...]
    start: int
    end: int
    dtype: str
    digest: str
    needs_tokenizer: bool = False


def is_vision(config: dict[str, Any]) -> bool:
    """Whether a model sees images and no text."""
    return "image_size" in config and "vocab_size" not in config


def num_places(index: CheckpointIndex) -> int | None:
    """Hidden states that a vision model has of an image: as many as positions; None: unknown."""
    for entry in index.tensors.values():
        role = describe_tensor(entry.name, entry.shape, index.config)
        if role.kind == "position" and len(entry.shape) > 1:
            return entry.shape[-2]
    return None


def read_images(
    settings: CalibrationSettings, storage: Storage, pointer: str, index: CheckpointIndex
) -> Images:
    """The images of one expert.

    Args:
        settings: Where they are.
        storage: To read them.
        pointer: The ``calibration`` of the recipe that names them.
        index: The expert's checkpoint.

    Raises:
        RecipeError: ``bad_parameter``: they are no such images.
        CheckpointError: The file is no safetensors file.
        StorageError: It cannot be read.
    """
    data = settings.data

    def refuse(detail: str) -> RecipeError:
        fault = Fault(pointer, "bad_parameter", detail)
        return RecipeError(detail, code="bad_parameter", faults=[fault])

    if not (isinstance(data, str) and data.endswith(".safetensors")):
        raise refuse(
            f"{index.uri} is run on images: 'data' names a .safetensors file with a tensor"
            f" {PIXELS!r}, what the model's processor makes of them."
        )
    stat = storage.stat(storage.normalise(data))
    entries = {entry.name: entry for entry in read_header(storage, stat).entries}
    name = settings.field or PIXELS
    if name not in entries:
        known = shorten_list(sorted(entries)) or "none"
        raise refuse(
            f"{stat.uri} has no tensor {name!r} (it has {known}); name another with 'field'."
        )
    entry = entries[name]
    expected = _image_shape(index.config)
    if entry.dtype not in _DTYPES or len(entry.shape) != 4 or entry.shape[1:] != expected:
        raise refuse(
            f"{name!r} in {stat.uri} is {entry.dtype} {list(entry.shape)}; {index.uri} sees images"
            f" × {' × '.join(map(str, expected))}, in one of {', '.join(sorted(_DTYPES))}."
        )
    count = min(entry.shape[0], settings.samples)
    if count == 0:
        raise refuse(f"{name!r} in {stat.uri} holds no images.")
    size = (entry.end - entry.start) // entry.shape[0] * count
    if size > MAX_DATA_BYTES:
        raise refuse(
            f"{count} images of {stat.uri} have {size} bytes; {MAX_DATA_BYTES} are the most. Use"
            " fewer ('samples'), or store them as F16."
        )
    length = num_places(index)
    assert length is not None, "models of which that is not known are refused"
    return Images(
        settings=settings,
        file=stat,
        count=count,
        length=length,
        shape=expected,
        start=entry.start,
        end=entry.start + size,
        dtype=entry.dtype,
        digest=_digest(storage, stat, entry, size),
    )


def _image_shape(config: dict[str, Any]) -> tuple[int, ...]:
    size = config["image_size"]
    rows, columns = size if isinstance(size, list) else (size, size)
    return (config.get("num_channels", 3), rows, columns)


def _digest(storage: Storage, stat: ObjectStat, entry: HeaderEntry, size: int) -> str:
    data = bytearray(size)
    storage.read_into(stat.uri, entry.start, memoryview(data), version=stat.version)
    told = f"{entry.dtype} {list(entry.shape[1:])} ".encode()
    return "sha256:" + hashlib.sha256(told + data).hexdigest()
