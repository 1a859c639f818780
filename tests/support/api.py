"""A live service on a free port of loopback, over a real job store and a storage in memory."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx

from service.app import create_app
from service.auth import Scope
from service.feed import EventFeed
from service.jobs.records import Claim, JobRecord
from service.jobs.sql_store import SqlJobStore, open_store
from service.jobs.states import JobState
from service.server import Server, address_of, bind
from service.settings import Settings, load_settings
from tests.support.header_checkpoints import llama_tensors, put_checkpoint
from tests.support.jobs import bring_to
from tests.support.memory_storage import MemoryStorage

POLL_SECONDS = 0.01
_PATIENCE_SECONDS = 30
RECIPE: dict[str, Any] = {
    "merge_method": "linear",
    "models": [{"model": "mem://models/a"}, {"model": "mem://models/b"}],
    "parameters": {"weight": 0.5},
}


@dataclass
class LiveApi:
    """The service, its store, and clients with tokens."""

    url: str
    store: SqlJobStore
    storage: MemoryStorage
    settings: Settings
    server: Server
    openapi: dict[str, Any]
    clients: dict[str, httpx.Client] = field(default_factory=dict)

    def with_scopes(self, *scopes: str) -> httpx.Client:
        """A client whose token has these scopes and no others."""
        key = " ".join(scopes)
        if key not in self.clients:
            _, secret = self.store.create_token(f"token for {key or 'nothing'}", scopes)
            self.clients[key] = self.client({"Authorization": f"Bearer {secret}"})
        return self.clients[key]

    def client(self, headers: dict[str, str] | None = None) -> httpx.Client:
        """A client with these headers and no token of its own."""
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)

    @cached_property
    def admin(self) -> httpx.Client:
        """A client that may do everything."""
        return self.with_scopes(Scope.ADMIN)

    @property
    def feed(self) -> EventFeed:
        """The feed behind the event streams."""
        return self.server.services.feed

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that another thread brings about."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def submit(self, output: str, **fields: Any) -> dict[str, Any]:
        """A new job, by way of the API."""
        body = {"recipe": RECIPE, "output_uri": f"mem://out/{output}", **fields}
        response = self.admin.post("/v1/jobs", json=body)
        assert response.status_code == 201, response.text
        return response.json()

    def bring_to(self, state: JobState, **changes: Any) -> tuple[JobRecord, Claim | None]:
        """A new job in a state; jobs of earlier tests that wait for a runner are taken away."""
        while self.store.claim("nobody", 3600):
            pass
        return bring_to(self.store, state, **changes)

    def operations(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Method, path and description of every route."""
        for path, methods in self.openapi["paths"].items():
            for method, operation in methods.items():
                yield method.upper(), path, operation


@contextmanager
def live_api(folder: Path, template: Path, **settings: Any) -> Iterator[LiveApi]:
    """Serve in a thread until the context ends; ``template`` is a migrated database file."""
    shutil.copy(template, folder / "mergeyard.db")
    settings = {"failed_logins_per_minute": 1e9, **settings}
    chosen = load_settings(data_dir=folder, storage_roots=["mem://"], **settings)
    storage = MemoryStorage()
    for name in ("a", "b"):
        put_checkpoint(storage, f"mem://models/{name}", llama_tensors(hidden=64, layers=1))
    store = open_store(chosen.effective_database_url, migrate=False)
    app = create_app(chosen, store, storage=storage, poll_seconds=POLL_SECONDS)
    openapi = json.loads(json.dumps(app.openapi()))
    listener = bind("127.0.0.1", 0)
    server = Server(app, delay_seconds=chosen.shutdown_delay_seconds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="api")
    api = LiveApi(address_of(listener), store, storage, chosen, server, openapi)
    thread.start()
    try:
        yield api
    finally:
        for client in api.clients.values():
            client.close()
        server.request_stop()
        server.request_stop()  # the second time no delay is kept
        thread.join(timeout=30)
        store.close()
    assert not thread.is_alive()


def read_stream(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Events of a stream of lines, each with its ``id`` and ``event`` fields checked."""
    fields: dict[str, str] = {}
    for line in lines:
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            event = json.loads(fields["data"])
            assert fields["id"] == str(event.get("position", event["seq"]))
            assert fields["event"] == event["type"]
            yield event
            fields = {}
        elif not line:
            fields = {}
