"""Running a program and telling what it cost: processor time, wall time, memory, bytes moved."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_LOOK_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Cost:
    """What a program and all its children took.

    Attributes:
        cpu_seconds: User and system.
        wall_seconds: From start to end.
        peak_bytes: Most resident memory of all of them together, mapped files included.
        peak_anonymous_bytes: Likewise, without mapped files.
    """

    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int
    peak_anonymous_bytes: int


def run_measured(command: Sequence[str | Path], environment: dict[str, str], folder: Path) -> Cost:
    """Run a program to its end in a folder.

    Memory is looked at fifty times a second; where there is one process, the kernel's own figure
    for its peak counts if it is larger.

    Raises:
        SystemExit: It failed; with the end of what it said.
    """
    with tempfile.TemporaryFile() as said:
        begin = time.monotonic()
        child = subprocess.Popen(
            list(map(str, command)), env=environment, cwd=folder, stdout=said, stderr=said
        )
        process, peak, anonymous = psutil.Process(child.pid), 0, 0
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            resident, private = _memory(process)
            peak, anonymous = max(peak, resident), max(anonymous, private)
            time.sleep(_LOOK_SECONDS)
        wall = time.monotonic() - begin
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            end = said.read()[-2000:].decode(errors="replace")
            raise SystemExit(f"{' '.join(map(str, command))} failed:\n{end}")
    cpu = usage.ru_utime + usage.ru_stime
    return Cost(cpu, wall, max(peak, usage.ru_maxrss * 1024), anonymous)


def _memory(root: psutil.Process) -> tuple[int, int]:
    """Resident bytes of a process and its descendants, and those that are no mapped files."""
    resident = anonymous = 0
    try:
        family = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0, 0
    for process in family:
        try:
            memory = process.memory_info()
        except psutil.Error:
            continue
        resident += memory.rss
        anonymous += memory.rss - memory.shared
    return resident, anonymous
