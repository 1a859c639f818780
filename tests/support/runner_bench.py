"""A runner with everything around it under the test's control: clocks, threads, pool, store."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Executor, Future
from datetime import datetime
from typing import Any

import pytest

from merging.recipe import parse_recipe
from service.jobs.errors import StoreUnavailableError
from service.jobs.records import EventType, JobRecord, NewJob
from service.jobs.sql_store import SqlJobStore
from service.jobs.states import TERMINAL
from service.runner.loop import Runner
from service.runner.settings import RunnerSettings
from tests.support.fake_clock import FakeClock
from tests.support.fake_pool import FakePool
from tests.support.memory_storage import MemoryStorage

NUM_SHARDS = 3
NUM_TENSORS = 6
LEASE_SECONDS = 30.0


class StepExecutor(Executor):
    """Runs work at once, or keeps it until the test says so."""

    def __init__(self) -> None:
        self.holding = False
        self._kept: list[Callable[[], None]] = []

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(function(*args, **kwargs))
            except Exception as error:  # noqa: BLE001 - as executors do
                future.set_exception(error)

        if self.holding:
            self._kept.append(run)
        else:
            run()
        return future

    def run_kept(self) -> None:
        """Do what was kept."""
        kept, self._kept = self._kept, []
        for run in kept:
            run()

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""


class ShakyStore:
    """A job store that is out of reach while ``is_away``; ``fail_next`` makes one call fail late.

    ``fail_next`` names a method whose next call is carried out, but whose answer is lost.
    """

    def __init__(self, store: SqlJobStore) -> None:
        self.is_away = False
        self.fail_next: str | None = None
        self._store = store

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.is_away:
                raise StoreUnavailableError("The job database does not answer.")
            result = method(*args, **kwargs)
            if self.fail_next == name:
                self.fail_next = None
                raise StoreUnavailableError("The connection was lost.")
            return result

        return call


class Bench:
    """Store, storage with two tiny checkpoints, and runners to try things with.

    A test turns the loop by hand; each turn takes half a second of the fake clock.
    """

    def __init__(self, store: SqlJobStore, clock: FakeClock) -> None:
        self.store = store
        self.clock = clock
        self.storage = MemoryStorage()
        self.outputs = 0
        for name in ("a", "b"):
            write_checkpoint(self.storage, f"mem://models/{name}")

    def submit(self, **changes: Any) -> JobRecord:
        """Queue a merge of the two checkpoints into :data:`NUM_SHARDS` shards."""
        self.outputs += 1
        document = {
            "merge_method": "linear",
            "models": [{"model": "mem://models/a"}, {"model": "mem://models/b"}],
        }
        recipe = parse_recipe(document)
        values: dict[str, Any] = {
            "recipe_source": document,
            "recipe": document,
            "recipe_digest": recipe.digest,
            "method": "linear",
            "methods": ("linear",),
            "output_uri": f"mem://outputs/{self.outputs}",
            "options": {"max_shard_size": 1200},
        }
        job, _ = self.store.submit(NewJob(**{**values, **changes}))
        return job

    def runner(
        self,
        pool: FakePool | None = None,
        *,
        clock: Callable[[], datetime] | None = None,
        **settings: Any,
    ) -> BenchRunner:
        """A new runner with a pool of its own; ``clock``: its machine's, if that is wrong."""
        chosen = clock or self.clock
        return BenchRunner(self, pool or FakePool(self.storage), chosen, **settings)

    def assert_ended_once(self, job: JobRecord) -> None:
        """What holds for every job that has ended, however it went."""
        assert self.store.get(job.id).state in TERMINAL
        events = self.store.events(job.id)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        kinds = [event.type for event in events]
        assert kinds.count(EventType.JOB_FINISHED) == 1
        assert kinds[-1] == EventType.JOB_FINISHED
        assert all(shard.state != "running" for shard in self.store.shards(job.id))

    def output(self, job: JobRecord) -> set[str]:
        """Names of what is at the job's output."""
        return {item.uri[len(job.output_uri) + 1 :] for item in self.storage.list(job.output_uri)}


class BenchRunner:
    """A runner whose loop the test turns."""

    def __init__(
        self, bench: Bench, pool: FakePool, clock: Callable[[], datetime], **settings: Any
    ) -> None:
        self.bench = bench
        self.pool = pool
        self.threads = StepExecutor()
        self.store = ShakyStore(bench.store)
        self.runner = Runner(
            self.store,
            lambda: bench.storage,
            pool,
            RunnerSettings(**{"lease_seconds": LEASE_SECONDS, **settings}),
            clock=clock,
            monotonic=bench.clock.monotonic,
            threads=self.threads,
        )

    def turn(self, times: int = 1, *, beat: bool = True) -> None:
        """Turn the loop; by default the heartbeat does its part too."""
        for _ in range(times):
            if beat:
                self.runner.heartbeat.beat()
            self.runner.tick(0)
            self.bench.clock.advance(0.5)

    def turn_until(self, condition: Callable[[], Any], *, limit: int = 300) -> None:
        """Turn the loop until a condition holds."""
        for _ in range(limit):
            if condition():
                return
            self.turn()
        pytest.fail("the runner did not get there")

    def finish(self, *jobs: JobRecord) -> list[JobRecord]:
        """Turn until the jobs have ended; they as they are then."""
        store = self.bench.store
        self.turn_until(lambda: all(store.get(job.id).is_terminal for job in jobs))
        for job in jobs:
            self.bench.assert_ended_once(job)
        return [store.get(job.id) for job in jobs]


def write_checkpoint(storage: MemoryStorage, uri: str, fill: bytes = b"\0") -> None:
    """A checkpoint of :data:`NUM_TENSORS` vectors of 100 float32 entries."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for number in range(NUM_TENSORS):
        offsets = [400 * number, 400 * (number + 1)]
        name = f"model.layers.{number}.input_layernorm.weight"
        header[name] = {"dtype": "F32", "shape": [100], "data_offsets": offsets}
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + fill * (400 * NUM_TENSORS)
    storage.write_bytes(f"{uri}/model.safetensors", data)
    storage.write_bytes(f"{uri}/config.json", json.dumps({"model_type": "llama"}).encode())
