"""API or runner as a process, with a stub in the place of workers: for ``benchmarks.service``.

``python -m benchmarks.instant_service FOLDER DATABASE api`` prints its address and a token as one
line of JSON; with ``runner`` it prints a line once it claims jobs.
"""

from __future__ import annotations

import collections
import json
import signal
import sys
import threading
import time
from pathlib import Path

from merging.plan.packing import shard_header
from merging.receipts import Receipt, write_receipt
from merging.storage.base import Storage
from merging.storage.router import open_storage
from service.app import create_app
from service.auth import Scope
from service.jobs.sql_store import open_store
from service.jobs.store import JobStore
from service.logs import configure_logging
from service.runner.loop import Runner
from service.runner.settings import RunnerSettings
from service.server import Server, address_of, bind, prepare_process
from service.settings import load_settings
from workers.messages import PoolEvent, ShardDone, ShardStarted, ShardTask

_SLOTS = 16


class InstantPool:
    """A stub of :class:`workers.pool.ShardPool`: shards are zeros, done when they are asked for.

    Files and receipts are written, since publishing verifies them.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._events: collections.deque[PoolEvent] = collections.deque()

    def slots(self) -> int:
        """Tasks that the runner should think of as running at once."""
        return _SLOTS

    def submit(self, task: ShardTask) -> None:
        """Do a task."""
        key = (task.job_id, task.work.shard.index, task.attempt)
        receipt = self._publish(task)
        self._events.append(ShardStarted(*key, worker="stub", device="cpu"))
        self._events.append(ShardDone(*key, receipt=receipt))

    def poll(self, timeout: float) -> list[PoolEvent]:
        """What was done since the last time."""
        if not self._events:
            time.sleep(timeout)
        events = list(self._events)
        self._events.clear()
        return events

    def cancel(self, job_id: str, *, now: bool = False) -> None:
        """Nothing is ever in flight."""

    def close(self) -> None:
        """Nothing is held."""

    def _publish(self, task: ShardTask) -> Receipt:
        work = task.work
        header = shard_header(work.shard.problems)
        data = header + bytes(work.shard.size - len(header))
        (stat,) = [self._storage.write_bytes(uri, data) for uri in work.file_uris]
        receipt = Receipt(
            plan_digest=work.plan_digest,
            shard_index=work.shard.index,
            file_name=work.shard.file_name,
            size=work.shard.size,
            sha256="0" * 64,
            version=stat.version,
            bytes_read=work.shard.bytes_read,
            read_requests=1,
            peak_buffer_bytes=0,
            seconds={"total": 0.0},
            device="cpu",
            worker="stub",
            problems=(),
        )
        write_receipt(self._storage, work.output_uri, receipt)
        return receipt


def _serve(folder: Path, store: JobStore, storage: Storage) -> None:
    settings = load_settings(data_dir=folder / "data", storage_roots=(str(folder),), pool="local")
    _, token = store.create_token("benchmark", [Scope.ADMIN])
    server = Server(create_app(settings, store, storage=storage))
    listener = bind("127.0.0.1", 0)
    print(json.dumps({"url": address_of(listener), "token": token}), flush=True)
    prepare_process()
    server.run(sockets=[listener])


def _run_jobs(folder: Path, store: JobStore, storage: Storage) -> None:
    runner = Runner(
        store,
        lambda: storage,
        InstantPool(storage),
        RunnerSettings(storage_roots=(str(folder),), device="cpu", max_concurrent_jobs=_SLOTS),
    )
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    runner.start()
    print("ready", flush=True)
    ended.wait()
    runner.stop(drain=False)


def main(folder: Path, database: str, part: str) -> None:
    """Be one of the two until SIGTERM."""
    configure_logging(as_json=True)
    (folder / "data").mkdir(exist_ok=True)
    store, storage = open_store(database), open_storage((str(folder),))
    try:
        (_serve if part == "api" else _run_jobs)(folder, store, storage)
    finally:
        store.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
