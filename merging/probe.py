"""Measuring how fast a device of this machine works, by small loads of what merging consists of."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from merging.rates import Rates

_SMALLEST, _LARGEST = 64, 4096
_STEP_SECONDS = 0.02
"""The sizes of the matrices that are measured double up to a step as long as this."""

_TIMED_FLOPS = 4 * 512**3
"""Steps on small matrices are repeated up to so many operations, so that their time can be read."""

_ENTRIES = 1 << 21
_CHECKED_ENTRIES = 1 << 18
_FILE_BYTES = 16 << 20


def measure_rates(device: str, name: str, threads: int, folder: Path | None = None) -> Rates:
    """Measure a device of this machine; takes about a second.

    Args:
        device: Torch device.
        name: What to call it.
        threads: Torch threads to measure with.
        folder: Where a file of 16 MiB may be written and read; None leaves storage unknown.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        probe = _Probe(device)
        steps, operations, entries = probe.steps(), probe.operations(), probe.entries()
    finally:
        torch.set_num_threads(before)
    read, written = _measure_file(folder) if folder else (None, None)
    return Rates(
        machine=platform.node(),
        device=name,
        threads=threads,
        steps=steps,
        operations=operations,
        entries=entries,
        read={"file": read} if read else {},
        written={"file": written} if written else {},
    )


class _Probe:
    """Loads for one device; their values are drawn without touching global random state."""

    def __init__(self, device: str) -> None:
        import torch

        self._device = torch.device(device)
        generator = torch.Generator().manual_seed(0)
        self._values = torch.randn(_ENTRIES, generator=generator).to(self._device)

    def steps(self) -> tuple[tuple[int, float], ...]:
        """Flop/s of solver steps by size, up to a size that takes long."""
        found: list[tuple[int, float]] = []
        size, seconds = _SMALLEST, 0.0
        while not found or (size <= _LARGEST and seconds < _STEP_SECONDS):
            flops = 2.0 * size**3
            seconds = self._time_step(size, max(1, int(_TIMED_FLOPS / flops)))
            found.append((size, flops / seconds))
            size *= 2
        return tuple(found)

    def _time_step(self, size: int, steps: int) -> float:
        """Seconds of a product as in a gradient, and of two passes over its result."""
        import torch

        matrix, result, average, target = self._values.new_ones((4, size, size))

        def load() -> None:
            for _ in range(steps):
                torch.addmm(target, matrix, matrix, beta=-1, out=result)
                average.lerp_(result, 0.1)
                target.addcdiv_(average, matrix, value=-1e-6)

        return self._time(load) / steps

    def operations(self) -> float:
        """Operations per second of task arithmetic, which counts three per expert and entry."""
        import torch

        from merging.ops.task_vectors import combine_task_vectors

        base = self._values.to(torch.bfloat16)
        experts = [base, base, base]

        def load() -> None:
            combine_task_vectors(base, experts, [0.5, 0.5, 0.5], scale=0.5, normalize=False)

        return 3 * len(experts) * _ENTRIES / self._time(load)

    def entries(self) -> float:
        """Entries per second through the check of an input and the rounding of an output."""
        import torch

        stored = self._values.to("cpu", torch.bfloat16)

        def load() -> None:
            rounded = self._values.to(torch.bfloat16).cpu()
            for host in (stored, rounded):
                for block in host.split(_CHECKED_ENTRIES):
                    torch.aminmax(block)

        return 2 * _ENTRIES / self._time(load)

    def _time(self, load: Callable[[], None]) -> float:
        """Seconds of the faster of two runs, after one that pays for first times."""
        return min([self._run(load) for _ in range(3)][1:])

    def _run(self, load: Callable[[], None]) -> float:
        import torch

        begin = time.perf_counter()
        load()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - begin


def _measure_file(folder: Path) -> tuple[float, float] | tuple[None, None]:
    """Bytes per second of reading, and of hashing and writing; unknown if the folder is not ours.

    The file is dropped from the page cache in between, where the system can do that.
    """
    data = os.urandom(1 << 20) * (_FILE_BYTES >> 20)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            begin = time.perf_counter()
            hashlib.sha256(data)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter() - begin
            with contextlib.suppress(AttributeError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begin = time.perf_counter()
            file.seek(0)
            file.read()
            read = time.perf_counter() - begin
    except OSError:
        return None, None
    return _FILE_BYTES / read, _FILE_BYTES / written
