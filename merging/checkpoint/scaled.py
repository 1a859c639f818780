"""Weights whose stored numbers mean nothing by themselves, since scales in other tensors belong."""

from __future__ import annotations

import re
from collections.abc import Mapping

from merging.checkpoint.index import TensorEntry

_SCALE = re.compile(r"(.+?)(_scale_inv|_scales?|\.scales|\.absmax)")
"""``weight_scale_inv`` of DeepSeek's and others' blocks, ``weight_scale`` of compressed tensors,
``gate_up_proj_scales`` of MXFP4, ``scales`` of GPTQ and AWQ, ``absmax`` of bitsandbytes."""

_OF_SCALE = ("", "_blocks", ".qweight", ".weight")
_PACKED = frozenset({"F8_E4M3", "F8_E5M2", "U8", "I8", "I32", "U32"})


def scaled_tensors(tensors: Mapping[str, TensorEntry]) -> list[str]:
    """Names of tensors in a narrow type beside which there is a tensor of their scales."""
    stems = [match[1] for match in map(_SCALE.fullmatch, tensors) if match]
    named = {stem + rest for stem in stems for rest in _OF_SCALE} & tensors.keys()
    return sorted(name for name in named if tensors[name].dtype in _PACKED)
