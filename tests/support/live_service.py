"""A whole service in this process: API, runner and a local pool over files on disk."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from merging.storage.router import open_storage
from service.app import create_app
from service.auth import Scope
from service.client import Client
from service.jobs.sql_store import SqlJobStore, open_store
from service.jobs.store import JobStore
from service.runner.loop import Runner
from service.runner.settings import RunnerSettings
from service.runner.traces import traced
from service.server import Server, address_of, bind
from service.settings import load_settings
from service.tracing import open_tracing
from workers.local_pool import LocalPool
from workers.pool import ShardPool
from workers.shard_task import ENGINE

_PATIENCE_SECONDS = 30


@dataclass(frozen=True)
class LiveService:
    """A running service.

    Attributes:
        url: Where it listens.
        token: Secret of an administrator's token.
        store: Its job store.
    """

    url: str
    token: str
    store: SqlJobStore

    @contextmanager
    def client(self) -> Iterator[Client]:
        """A client that may do everything."""
        with Client(self.url, self.token) as client:
            yield client


@contextmanager
def live_service(
    data_dir: Path,
    root: Path | str,
    *,
    port: int = 0,
    engine: str = ENGINE,
    root_path: str = "",
    otlp_endpoint: str | None = None,
    **runner_settings: Any,
) -> Iterator[LiveService]:
    """Serve in threads until the context ends; jobs may read and write below ``root``."""
    roots = (str(root),)
    chosen = load_settings(
        data_dir=data_dir, storage_roots=roots, pool="local", device="cpu", root_path=root_path
    )
    quick = RunnerSettings(
        storage_roots=roots,
        device="cpu",
        **{"claim_seconds": 0.05, "progress_seconds": 0.05, **runner_settings},
    )
    with ExitStack() as stack:
        stack.enter_context(_no_log_lines())
        data_dir.mkdir(parents=True, exist_ok=True)
        store = open_store(chosen.effective_database_url)
        stack.callback(store.close)
        tracing = None
        seen: JobStore = store
        pool: ShardPool = LocalPool(engine=engine)
        if otlp_endpoint is not None:
            tracing = open_tracing(otlp_endpoint, "0")
            stack.callback(tracing.close)
            seen, pool = traced(store, pool, tracing, otlp_endpoint)
        stack.callback(pool.close)
        runner = Runner(seen, lambda: open_storage(roots), pool, quick)
        app = create_app(
            chosen, store, storage=open_storage(roots), poll_seconds=0.02, tracing=tracing
        )
        server = Server(app)
        listener = bind("127.0.0.1", port)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="api")
        _, token = store.create_token("test", [Scope.ADMIN])
        runner.start()
        stack.callback(runner.stop, drain=False)
        thread.start()
        stack.callback(thread.join, _PATIENCE_SECONDS)
        stack.callback(server.request_stop)
        yield LiveService(address_of(listener, chosen.root_path), token, store)
    assert not thread.is_alive()
    assert not runner.is_running


@contextmanager
def _no_log_lines() -> Iterator[None]:
    """Log lines go to standard output unless configured, at any time, also between tests."""

    def drop(*_: Any) -> Any:
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[drop])
    try:
        yield
    finally:
        structlog.configure(**before)
