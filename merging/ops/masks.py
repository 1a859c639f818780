"""Which entries of a tensor are kept, in as little memory as can be read quickly."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class Mask:
    """Truth values of a tensor's entries: bits on a CPU, bytes elsewhere."""

    def __init__(self, num_entries: int, device: torch.device) -> None:
        self._bits = np.empty(0, dtype=np.uint8)
        self._bytes = torch.empty(0, dtype=torch.bool, device=device)
        self._is_packed = device.type == "cpu"
        if self._is_packed:
            self._bits = np.empty(-(-num_entries // 8), dtype=np.uint8)
        else:
            self._bytes = self._bytes.new_empty(num_entries)

    def write(self, start: int, values: Any) -> None:
        """Those of the entries from ``start``, a multiple of 8."""
        if self._is_packed:
            packed = np.packbits(values)
            self._bits[start // 8 : start // 8 + len(packed)] = packed
        else:
            self._bytes[start : start + len(values)] = values

    def read(self, start: int, count: int) -> Any:
        """Those of so many entries from ``start``, a multiple of 8, as an array or a tensor."""
        if not self._is_packed:
            return self._bytes[start : start + count]
        packed = self._bits[start // 8 : -(-(start + count) // 8)]
        return np.unpackbits(packed, count=count).view(np.bool_)
