"""Which device a worker solves on."""

from __future__ import annotations

import re

from merging.errors import WorkerError

_CUDA = re.compile(r"cuda(?::(\d+))?")


def choose_device(wanted: str) -> str:
    """The torch device for a task that asks for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    ``auto`` takes the first GPU that this process may see, else the CPU. Ray shows a worker only
    the GPUs that it was given, so the first one is the right one there.

    Raises:
        WorkerError: ``device_unavailable`` if a GPU is asked for that is not there.
    """
    if wanted == "cpu":
        return "cpu"
    match = _CUDA.fullmatch(wanted)
    if wanted != "auto" and match is None:
        raise WorkerError(
            f"Device {wanted!r} is unknown; write auto, cpu, cuda or cuda:N.",
            code="device_unavailable",
        )
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if match is None:
        return "cuda:0" if count else "cpu"
    number = int(match.group(1) or 0)
    if number >= count:
        raise WorkerError(
            f"Device {wanted!r} is asked for, but this worker sees {count} CUDA device(s)."
            " Use device auto or cpu, or run workers on machines with a GPU and its driver.",
            code="device_unavailable",
            context={"expected": wanted, "found": count},
        )
    return f"cuda:{number}"
