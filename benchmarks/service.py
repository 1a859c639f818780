"""The service under many jobs, readers and watchers; shards are a stub's, and take no time.

One process is the API, one the runner, and this one the load: jobs are submitted and things are
read at fixed rates, whatever the answers take (a late answer counts from when it was due), and
watchers follow events: nine in ten those of a team's jobs, as somebody with the list of jobs open
does, the tenth one job after another to its end. A line says every few seconds how it goes.
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
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
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
_TRIES = 5
_TEAMS = 20
_JOB_WATCHERS = 10
"""One watcher of so many follows single jobs."""

_ENDED = ("succeeded", "failed", "cancelled")
_COLUMNS = {
    "seconds": 0,
    "jobs_done": 0,
    "jobs_per_second": 1,
    "reads_per_second": 1,
    "p50_ms": 1,
    "p99_ms": 1,
    "events_per_second": 0,
    "streams_per_second": 0,
    "api_cpu": 2,
    "runner_cpu": 2,
    "load_cpu": 2,
    "api_mb": 1,
    "runner_mb": 1,
}
"""Of the lines that are printed, with their digits; ``cpu`` is in cores."""


@dataclass
class Load:
    """What is asked, and what came of it. Times in seconds.

    Attributes:
        session: Connections to the service.
        folder: With two checkpoints; merged ones go there too.
        chosen: How much of everything.
        ids: Of the jobs that were accepted.
        latencies: By kind of request.
        failures: Requests that came to nothing, by kind.
        lately: Of reads, since this was last emptied.
        streams: Event streams that were opened.
        events: That watchers received.
    """

    session: aiohttp.ClientSession
    folder: Path
    chosen: argparse.Namespace
    ids: list[str] = field(default_factory=list)
    latencies: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    lately: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    streams: int = 0
    events: int = 0

    async def submit(self) -> None:
        """All jobs, at their rate."""
        async with asyncio.TaskGroup() as group:
            async for number, due in _at_rate(self.chosen.jobs_per_second):
                if number == self.chosen.jobs:
                    return
                group.create_task(self._submit_one(number, due))

    async def _submit_one(self, number: int, due: float) -> None:
        models = [{"model": str(self.folder / name)} for name in "ab"]
        body = {
            "recipe": {"merge_method": "linear", "models": models},
            "output_uri": str(self.folder / "outputs" / str(number)),
            "labels": {"team": str(number % _TEAMS)},
        }
        headers = {"Idempotency-Key": str(number)}  # so that another try makes no second job
        for _ in range(_TRIES):
            with self._counted_failures():
                async with self.session.post("/v1/jobs", json=body, headers=headers) as answer:
                    answer.raise_for_status()
                    self.ids.append((await answer.json())["id"])
                self.latencies["submit"].append(time.perf_counter() - due)
                return

    async def read(self) -> None:
        """Requests at their rate, until cancelled."""
        routes, weights = zip(*_READS, strict=True)
        async with asyncio.TaskGroup() as group:
            async for _, due in _at_rate(self.chosen.reads_per_second):
                if self.ids:
                    (route,) = random.choices(routes, weights)
                    group.create_task(self._read_one(route, due))

    async def _read_one(self, route: str, due: float) -> None:
        path = route.replace("{id}", random.choice(self.ids[-1000:]))
        with self._counted_failures():
            async with self.session.get(path) as answer:
                answer.raise_for_status()
                await answer.read()
            taken = time.perf_counter() - due
            self.latencies[route].append(taken)
            self.lately.append(taken)

    async def watch(self, number: int) -> None:
        """Follow events, until cancelled: those of a team's jobs, or one job after another."""
        while True:
            if number % _JOB_WATCHERS:
                await self._follow(f"/v1/events?label.team={number % _TEAMS}")
                continue
            if self.ids:
                await self._follow(f"/v1/jobs/{random.choice(self.ids[-20:])}/events")
            await asyncio.sleep(random.uniform(0.5, 1.5))

    async def _follow(self, path: str) -> None:
        with self._counted_failures():
            async with self.session.get(path, headers={"Accept": "text/event-stream"}) as stream:
                stream.raise_for_status()
                self.streams += 1
                async for line in stream.content:
                    self.events += line.startswith(b"data:")

    @contextmanager
    def _counted_failures(self) -> Iterator[None]:
        try:
            yield
        except aiohttp.ClientError as error:
            self.failures[f"{type(error).__name__} {getattr(error, 'status', '')}".strip()] += 1

    async def jobs_done(self) -> int:
        """Jobs that have ended."""
        async with self.session.get("/v1/jobs/counts") as answer:
            counts = (await answer.json())["counts"]
        return sum(counts[state] for state in _ENDED)


async def _at_rate(per_second: float) -> AsyncIterator[tuple[int, float]]:
    """Numbers from 0, each with the time at which it is due, and then."""
    begin = time.perf_counter()
    number = 0
    while per_second > 0:
        due = begin + number / per_second
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        yield number, due
        number += 1


class Observer:
    """Says how it goes, and keeps what it said in ``samples``.

    Args:
        load: What is being done.
        parts: The service's processes, by name.
    """

    def __init__(self, load: Load, parts: dict[str, psutil.Process]) -> None:
        self.samples: list[dict[str, float]] = []
        self._load = load
        self._parts = parts
        self._begin = time.perf_counter()
        self._first = self._last = self._totals(0)
        print("  ".join(_COLUMNS), flush=True)

    async def watch(self, jobs: int, seconds: float) -> bool:
        """Look on until so many jobs are done (True), or time is up (False)."""
        done = 0
        while done < jobs and self._last["seconds"] < seconds:
            await asyncio.sleep(_SAMPLE_SECONDS)
            with suppress(aiohttp.ClientError):  # the next line will tell
                done = await self._load.jobs_done()
            self._tell(self._totals(done))
        return done >= jobs

    def summary(self) -> dict[str, float]:
        """Figures of the whole time."""
        return _rates(self._first, self._last)

    def _totals(self, done: int) -> dict[str, float]:
        """What has come together so far."""
        load = self._load
        cpu = {f"{name}_cpu": sum(part.cpu_times()[:2]) for name, part in self._parts.items()}
        return {
            "seconds": time.perf_counter() - self._begin,
            "jobs": done,
            "reads": sum(len(load.latencies[route]) for route, _ in _READS),
            "events": load.events,
            "streams": load.streams,
            **cpu,
        }

    def _tell(self, now: dict[str, float]) -> None:
        found = {
            "seconds": now["seconds"],
            "jobs_done": now["jobs"],
            **_rates(self._last, now),
            **_percentiles(self._load.lately),
            **{f"{name}_mb": part.memory_info().rss / 1e6 for name, part in self._parts.items()},
        }
        self._last = now
        self._load.lately.clear()
        self.samples.append({name: round(found[name], 2) for name in _COLUMNS})
        texts = (f"{found[name]:{len(name)}.{digits}f}" for name, digits in _COLUMNS.items())
        print("  ".join(texts), flush=True)


def _rates(first: dict[str, float], last: dict[str, float]) -> dict[str, float]:
    span = last["seconds"] - first["seconds"]
    each = {name: (last[name] - first[name]) / span for name in last if name != "seconds"}
    return {name if "cpu" in name else f"{name}_per_second": each[name] for name in each}


def _percentiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return dict.fromkeys(("p50_ms", "p99_ms", "max_ms"), 0.0)
    values = np.percentile(seconds, [50, 99, 100]) * 1e3
    return dict(zip(("p50_ms", "p99_ms", "max_ms"), values.round(1).tolist(), strict=True))


async def run(
    chosen: argparse.Namespace, folder: Path, access: dict[str, str], parts: dict[str, Any]
) -> dict[str, Any]:
    """Put the load on a started service; the figures."""
    headers = {"Authorization": f"Bearer {access['token']}"}
    # Idle connections go before the server closes them (after 5 s), which a request may cross.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        access["url"], headers=headers, connector=connector, timeout=timeout
    ) as session:
        load = Load(session, folder, chosen)
        observer = Observer(load, parts)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in (load.submit(), load.read())]
            tasks += [group.create_task(load.watch(number)) for number in range(chosen.watchers)]
            is_whole = await observer.watch(chosen.jobs, chosen.seconds)
            for task in tasks:
                task.cancel()
    return _figures(load, observer, is_whole=is_whole)


def _figures(load: Load, observer: Observer, *, is_whole: bool) -> dict[str, Any]:
    reads = [value for route, _ in _READS for value in load.latencies[route]]
    done = observer.samples[-1]["jobs_done"]
    return {
        "shards": "stub: zeros, at once",
        "ended": "all jobs were done" if is_whole else "time was up",
        "jobs": {"asked": load.chosen.jobs, "accepted": len(load.ids), "done": int(done)},
        "seconds": observer.samples[-1]["seconds"],
        **{name: round(value, 3) for name, value in observer.summary().items()},
        "failures": load.failures,
        "all_reads": _percentiles(reads),
        **{kind: _percentiles(values) for kind, values in sorted(load.latencies.items())},
        "load_average": os.getloadavg(),
        "cores": os.cpu_count(),
        "lines": observer.samples,
    }


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


@contextmanager
def _part(folder: Path, database: str, name: str) -> Iterator[tuple[psutil.Process, str]]:
    """A process of the service, and the line that it says when it is ready."""
    command = [sys.executable, "-m", "benchmarks.instant_service", str(folder), database, name]
    with (
        (folder / f"{name}.log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            yield psutil.Process(process.pid), process.stdout.readline()
        finally:
            process.terminate()


def main(arguments: list[str]) -> None:
    """Start the service, put the load on it, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks service")
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--jobs-per-second", type=float, default=20)
    parser.add_argument("--watchers", type=int, default=200, help="event streams")
    parser.add_argument("--reads-per-second", type=float, default=200)
    parser.add_argument("--seconds", type=float, default=900, help="end by then, done or not")
    parser.add_argument("--database", default=None, help="address; default: SQLite in the folder")
    parser.add_argument("--folder", type=Path, default=None, help="default: memory, if there is")
    parser.add_argument("--json", type=Path, default=None, help="where to write the figures")
    chosen = parser.parse_args(arguments)
    memory = Path("/dev/shm")
    place = chosen.folder or (memory if memory.is_dir() else None)
    with tempfile.TemporaryDirectory(prefix="mergeyard-load-", dir=place) as name:
        folder = Path(name)
        _write_checkpoints(folder)
        database = chosen.database or f"sqlite:///{folder}/jobs.db"
        with (
            _part(folder, database, "api") as (api, access),
            _part(folder, database, "runner") as (runner, _),
        ):
            parts = {"api": api, "runner": runner, "load": psutil.Process()}
            figures = asyncio.run(run(chosen, folder, json.loads(access), parts))
    print(json.dumps({key: figures[key] for key in figures if key != "lines"}, indent=2))
    if chosen.json is not None:
        write_record(chosen.json, torch.device("cpu"), figures)


if __name__ == "__main__":
    main(sys.argv[1:])
