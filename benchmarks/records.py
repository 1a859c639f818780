"""What a figure needs beside it to mean something, and clocks that can be trusted."""

from __future__ import annotations

import datetime
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def conditions(device: torch.device) -> dict[str, Any]:
    """Machine, date, command and versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "machine": platform.node(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_record(path: Path, device: torch.device, figures: Any) -> None:
    """Write conditions and figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {**conditions(device), "figures": figures}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of one call: CPU seconds, which others on the machine do not change, or a GPU's.

    With one thread CPU seconds are what the call takes on an idle machine.
    """
    if device.type != "cuda":
        begin = time.process_time()
        run()
        return (time.process_time() - begin) / torch.get_num_threads()
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def interleaved(
    runs: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, float]:
    """The best time of each run over several rounds, in which they take turns.

    A disturbance that lasts then hits all of them. A first round, which pays for first times, does
    not count.
    """
    best = dict.fromkeys(runs, float("inf"))
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = seconds(run, device)
            if number:
                best[name] = min(best[name], taken)
    return best


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
