"""Data types by their safetensors names, without importing torch.

Planning works on headers alone and runs where torch is not loaded; only :func:`torch_dtype`
needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ITEM_SIZE: dict[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes per entry of every safetensors dtype that is read."""

BITS = "BITS"
"""No type of safetensors: what is read holds eight entries in a byte, the first one in the highest
bit (``numpy.packbits``)."""

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
"""Types that are merged; all others are copied."""

WRITABLE_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Float types that a merged tensor may be written in. F8 checkpoints carry scales that a cast
would not produce, so F8 is read only."""

RECIPE_NAMES: dict[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
}
"""Names that recipes use for ``dtype`` and ``out_dtype``, and config.json for ``torch_dtype``."""

_TORCH_NAMES: dict[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    BITS: "uint8",
}


def is_float(dtype: str) -> bool:
    """Whether tensors of this type are merged rather than copied."""
    return dtype in FLOAT_DTYPES


def recipe_name(dtype: str) -> str:
    """The recipe's and config.json's name of a float type (``BF16`` → ``bfloat16``)."""
    return _TORCH_NAMES[dtype]


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch type of a safetensors type."""
    import torch

    found = getattr(torch, _TORCH_NAMES[dtype])
    assert isinstance(found, torch.dtype)
    return found
