"""A whole merge of 13 billion parameters through the service: memory, speed, share of the disk's.

    python -m benchmarks.whole_model --folder DIR [--json FILE]

Two models of 26 GB each, whose weights are zeros that take no room, are merged by ``linear`` into
26 GB that do: DIR needs 30 GB. The service runs with Ray on this machine, one worker per core.
The disk's rate is measured before and after by writing a GiB and waiting for it; sources are holes,
so only writing meets the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.records import write_record
from benchmarks.sparse_models import SHAPES, write_sparse_model
from service.client import Client
from tests.support.service_process import ServiceProcess, running_service

MODEL = "13B"
_CHUNK = 16 << 20
_PROBE_CHUNKS = 64


def main() -> None:
    """Run once and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="a folder with 30 GB of room")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        figures = run(Path(name))
    print(json.dumps(figures, indent=2))
    if arguments.json:
        write_record(arguments.json, torch.device("cpu"), figures)


def run(folder: Path) -> dict[str, Any]:
    """The figures of one merge."""
    sources = [write_sparse_model(folder / name, SHAPES[MODEL]) for name in ("one", "two")]
    before = write_rate(folder)
    cores = os.cpu_count() or 1
    environment = {"MERGEYARD_RAY_NUM_CPUS": str(cores), "OMP_NUM_THREADS": "1"}
    with running_service(folder / "data", [str(folder)], environment) as service:
        watch = MemoryWatch(service)
        recipe = {
            "merge_method": "linear",
            "models": [{"model": str(source)} for source in sources],
        }
        begin = time.monotonic()
        with service.client() as client:
            job = merge(client, recipe, folder / "merged")
            report = client.report(job["id"])
        seconds = time.monotonic() - begin
        peaks = watch.stop()
    after = write_rate(folder)
    written, read = report["output"]["bytes"], report["bytes_read"]
    disk = statistics.mean([before, after])
    return {
        "seconds": round(seconds, 1),
        "bytes_read": read,
        "bytes_written": written,
        "workers": cores,
        "shards": len(report["output"]["files"]),
        "peak_worker_bytes": max(peaks.values()),
        "memory_budget_bytes": 4 << 30,
        "read_mb_per_second": round(read / seconds / 1e6, 1),
        "written_mb_per_second": round(written / seconds / 1e6, 1),
        "disk_write_mb_per_second": {"before": round(before / 1e6), "after": round(after / 1e6)},
        "share_of_disk": round(written / seconds / disk, 3),
        "stage_seconds": report["seconds"],
        "busy_seconds": report["busy_seconds"],
        "peak_buffer_bytes": report["peak_buffer_bytes"],
        "load_average": os.getloadavg(),
    }


def merge(client: Client, recipe: dict[str, Any], output: Path) -> dict[str, Any]:
    """Submit and wait."""
    job = client.submit(recipe, str(output))
    job = client.wait(job["id"])
    if job["state"] != "succeeded":
        raise SystemExit(f"the merge {job['state']}: {job['error']}")
    return job


class MemoryWatch:
    """Looks at the workers' memory (the pages that are theirs alone) four times a second."""

    def __init__(self, service: ServiceProcess) -> None:
        self._service = service
        self._peaks: dict[int, int] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-watch")
        self._thread.start()

    def stop(self) -> dict[int, int]:
        """Peaks by process id."""
        self._end.set()
        self._thread.join()
        return self._peaks

    def _run(self) -> None:
        while not self._end.wait(0.25):
            for process in self._service.descendants():
                try:
                    if "ray::" in process.name() or "ray::" in " ".join(process.cmdline()):
                        used = process.memory_full_info().uss
                        self._peaks[process.pid] = max(self._peaks.get(process.pid, 0), used)
                except psutil.Error:
                    continue


def write_rate(folder: Path) -> float:
    """Bytes a second of one writer that waits for the disk at the end."""
    path = folder / "probe"
    data = os.urandom(_CHUNK)
    begin = time.monotonic()
    with path.open("wb") as file:
        for _ in range(_PROBE_CHUNKS):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.monotonic() - begin
    path.unlink()
    return _CHUNK * _PROBE_CHUNKS / seconds


if __name__ == "__main__":
    main()
