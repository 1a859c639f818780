"""Round rates for tests of estimates."""

from __future__ import annotations

from typing import Any

import msgspec

from merging.rates import Rates

RATES = Rates(
    machine="here",
    device="cpu",
    threads=1,
    steps=((64, 1e9), (1024, 1e9)),
    operations=1e9,
    entries=1e9,
    read={"mem": 1e6, "file": 1e6},
    written={"mem": 1e6, "file": 1e6},
)
"""A slow machine: a thousand million operations and one megabyte a second."""


def rates(**changes: Any) -> Rates:
    """:data:`RATES` with changes."""
    return msgspec.structs.replace(RATES, **changes)
