"""The service under many jobs, readers and watchers; shards are a stub's, and take no time.

Jobs are submitted by a few clients without a pause. Meanwhile readers ask at a fixed rate, whatever
the answers take (a late answer counts from when it was due), and watchers follow one job after
another as event streams. The server is one process (API and runner), the load is this one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp  # comes with Ray
import numpy as np
import psutil
import torch
from safetensors.numpy import save_file

from benchmarks.records import write_record

_READS = (
    ("/v1/jobs/{id}", 50),
    ("/v1/jobs?limit=20", 20),
    ("/v1/jobs/{id}/events", 15),
    ("/v1/jobs/{id}/shards", 10),
    ("/v1/jobs/counts", 5),
)
_SAMPLE_SECONDS = 5.0


@dataclass
class Load:
    """What is asked, and what came of it. Times in seconds.

    Attributes:
        session: Connections to the service.
        inputs: Addresses of two checkpoints.
        outputs: Folder of the merged ones.
        ids: Of the jobs that were accepted.
        latencies: By kind of request.
        events: How many watchers received.
        memory: Of the server: time, resident MB, jobs that were done.
    """

    session: aiohttp.ClientSession
    inputs: list[str]
    outputs: Path
    ids: list[str] = field(default_factory=list)
    latencies: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    failures: int = 0
    events: int = 0
    memory: list[tuple[float, float, int]] = field(default_factory=list)

    async def submit(self, numbers: Any) -> None:
        """Jobs, one after the other."""
        for number in numbers:
            recipe = {"merge_method": "linear", "models": [{"model": uri} for uri in self.inputs]}
            body = {"recipe": recipe, "output_uri": str(self.outputs / str(number))}
            begin = time.perf_counter()
            async with self.session.post("/v1/jobs", json=body) as answer:
                answer.raise_for_status()
                self.ids.append((await answer.json())["id"])
            self.latencies["submit"].append(time.perf_counter() - begin)

    async def read(self, per_second: float) -> None:
        """Requests at a fixed rate, until cancelled."""
        routes, weights = zip(*_READS, strict=True)
        due = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            while True:
                due += 1 / per_second
                await asyncio.sleep(max(due - time.perf_counter(), 0))
                if self.ids:
                    (route,) = random.choices(routes, weights)
                    group.create_task(self._read_one(route, due))

    async def _read_one(self, route: str, due: float) -> None:
        path = route.replace("{id}", random.choice(self.ids[-1000:]))
        async with self.session.get(path) as answer:
            await answer.read()
            self.failures += answer.status != 200
        self.latencies[route].append(time.perf_counter() - due)

    async def watch(self) -> None:
        """Follow the newest job to its end, then the newest then, until cancelled."""
        headers = {"Accept": "text/event-stream"}
        last = ""
        while True:
            if not self.ids or self.ids[-1] == last:
                await asyncio.sleep(0.1)
                continue
            last = self.ids[-1]
            path = f"/v1/jobs/{last}/events"
            async with self.session.get(path, headers=headers) as stream:
                async for line in stream.content:
                    self.events += line.startswith(b"data:")

    async def sample(self, server: psutil.Process, num_jobs: int) -> None:
        """Note the server's memory now and then, until all jobs are done."""
        begin, done = time.perf_counter(), 0
        while done < num_jobs:
            await asyncio.sleep(_SAMPLE_SECONDS)
            async with self.session.get("/v1/jobs/counts") as answer:
                counts = (await answer.json())["counts"]
            done = sum(counts[state] for state in ("succeeded", "failed", "cancelled"))
            elapsed, resident = time.perf_counter() - begin, server.memory_info().rss / 1e6
            self.memory.append((round(elapsed, 1), round(resident, 1), done))
            print(f"{elapsed:7.0f} s {len(self.ids):7} accepted {done:7} done {resident:7.0f} MB")


async def run(chosen: argparse.Namespace, folder: Path, server: psutil.Process) -> dict[str, Any]:
    """Put the load on a started service; the figures."""
    start = json.loads((folder / "address").read_text())
    headers = {"Authorization": f"Bearer {start['token']}"}
    # Idle connections go before the server closes them (after 5 s), which a request may cross.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        start["url"], headers=headers, connector=connector, timeout=timeout
    ) as session:
        load = Load(session, [str(folder / name) for name in "ab"], folder / "outputs")
        begin, cpu = time.perf_counter(), sum(server.cpu_times()[:2])
        others = [asyncio.create_task(load.read(chosen.reads_per_second))]
        others += [asyncio.create_task(load.watch()) for _ in range(chosen.watchers)]
        async with asyncio.TaskGroup() as group:
            for first in range(chosen.submitters):
                group.create_task(load.submit(range(first, chosen.jobs, chosen.submitters)))
        submitted = time.perf_counter() - begin
        await load.sample(server, chosen.jobs)
        elapsed, cpu = time.perf_counter() - begin, sum(server.cpu_times()[:2]) - cpu
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    return _figures(load, submitted, elapsed, cpu)


def _figures(load: Load, submitted: float, elapsed: float, cpu: float) -> dict[str, Any]:
    reads = [value for route, _ in _READS for value in load.latencies[route]]
    return {
        "shards": "stub: zeros, at once",
        "seconds": {"submitting": round(submitted, 1), "until all were done": round(elapsed, 1)},
        "jobs_per_second": round(len(load.ids) / elapsed, 1),
        "submitted_per_second": round(len(load.ids) / submitted, 1),
        "reads_per_second": round(len(reads) / elapsed, 1),
        "reads_failed": load.failures,
        "events_per_second": round(load.events / elapsed, 1),
        "milliseconds": {
            "all reads": _percentiles(reads),
            **{kind: _percentiles(values) for kind, values in sorted(load.latencies.items())},
        },
        "server_cpu_seconds_per_job": round(cpu / len(load.ids), 4),
        "server_cpu_share": round(cpu / elapsed, 2),
        "memory": [dict(zip(("seconds", "mb", "jobs_done"), x, strict=True)) for x in load.memory],
        "load_average": os.getloadavg(),
    }


def _percentiles(seconds: list[float]) -> dict[str, float]:
    p50, p99, most = np.percentile(seconds, [50, 99, 100]) * 1e3
    return {"p50": round(p50, 1), "p99": round(p99, 1), "max": round(most, 1)}


def _write_checkpoints(folder: Path) -> None:
    for name in "ab":
        (folder / name).mkdir()
        tensors = {
            f"model.layers.{layer}.mlp.{part}_proj.weight": np.zeros((8, 8), np.float32)
            for layer in range(2)
            for part in ("up", "down")
        }
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text('{"model_type": "llama"}')


def main(arguments: list[str]) -> None:
    """Start the service, put the load on it, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks service")
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--submitters", type=int, default=4, help="clients that submit")
    parser.add_argument("--watchers", type=int, default=200, help="event streams")
    parser.add_argument("--reads-per-second", type=float, default=200)
    parser.add_argument("--folder", type=Path, default=None, help="default: memory, if there is")
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    chosen = parser.parse_args(arguments)
    memory = Path("/dev/shm")
    place = chosen.folder or (memory if memory.is_dir() else None)
    with tempfile.TemporaryDirectory(prefix="mergeyard-load-", dir=place) as name:
        folder = Path(name)
        _write_checkpoints(folder)
        command = [sys.executable, "-m", "benchmarks.instant_service", name]
        with (
            (folder / "log").open("w") as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server,
        ):
            assert server.stdout is not None
            try:
                (folder / "address").write_text(server.stdout.readline())
                figures = asyncio.run(run(chosen, folder, psutil.Process(server.pid)))
            finally:
                server.terminate()
    print(json.dumps({key: figures[key] for key in figures if key != "memory"}, indent=2))
    if chosen.json is not None:
        write_record(chosen.json, torch.device("cpu"), figures)


if __name__ == "__main__":
    main(sys.argv[1:])
