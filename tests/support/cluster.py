"""Several API replicas and runners on one PostgreSQL: real processes, to be killed."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service.client import Client
from tests.support.postgres import PostgresServer, running_postgres
from tests.support.service_process import ServiceProcess

LEASE_SECONDS = 3


class Cluster:
    """Services that share a database.

    Attributes:
        postgres: The database server.
        apis: Processes that only answer requests.
        runners: Processes that drive jobs, each with workers of its own.
    """

    def __init__(
        self,
        folder: Path,
        postgres: PostgresServer,
        *,
        roots: list[str],
        num_apis: int,
        num_runners: int,
        environment: Mapping[str, str],
        runner_prefix: Sequence[str] = (),
    ) -> None:
        self.postgres = postgres
        self._token = secrets.token_urlsafe(32)
        self._turn = itertools.count()
        self._has_tables = False
        common = {
            "MERGEYARD_DATABASE_URL": postgres.url,
            "MERGEYARD_ADMIN_TOKEN": self._token,
            "MERGEYARD_POOL": "local",
            "MERGEYARD_LEASE_SECONDS": str(LEASE_SECONDS),
            "OMP_NUM_THREADS": "1",
            **environment,
        }

        def make(name: str, *, run_jobs: bool) -> ServiceProcess:
            chosen = {**common, "MERGEYARD_RUN_JOBS": str(run_jobs)}
            prefix = runner_prefix if run_jobs else ()
            return ServiceProcess(folder / name, roots, chosen, prefix)

        self.apis = [make(f"api-{n}", run_jobs=False) for n in range(num_apis)]
        self.runners = [make(f"runner-{n}", run_jobs=True) for n in range(num_runners)]

    @property
    def services(self) -> list[ServiceProcess]:
        """All of them."""
        return [*self.apis, *self.runners]

    def start(self) -> None:
        """Start all that do not run; the database's tables come from the first."""
        missing = [service for service in self.services if not service.is_running]
        if not self._has_tables:
            missing.pop(0).start()
            self._has_tables = True
        with ThreadPoolExecutor(len(missing) or 1) as threads:
            list(threads.map(ServiceProcess.start, missing))

    def client(self, api: ServiceProcess | None = None) -> Client:
        """A client of an API replica; of each in turn by default."""
        running = [service for service in self.apis if service.is_running]
        chosen = api or running[next(self._turn) % len(running)]
        return Client(chosen.url, self._token)

    def submit(self, document: Mapping[str, Any], output: Path | str, **fields: Any) -> str:
        """A job, by way of any API replica; its id."""
        with self.client() as client:
            return str(client.submit(document, str(output), **fields)["id"])

    def stop(self) -> None:
        """End everything at once."""
        for service in self.services:
            service.kill()


@contextmanager
def running_cluster(
    folder: Path,
    roots: list[str],
    *,
    num_apis: int,
    num_runners: int,
    environment: Mapping[str, str] | None = None,
    runner_prefix: Sequence[str] = (),
) -> Iterator[Cluster]:
    """A started cluster for the length of the block.

    ``runner_prefix`` goes before the command of each runner.

    Raises:
        FileNotFoundError: PostgreSQL is not installed.
    """
    with running_postgres(is_durable=True) as postgres:
        cluster = Cluster(
            folder,
            postgres,
            roots=roots,
            num_apis=num_apis,
            num_runners=num_runners,
            environment=environment or {},
            runner_prefix=runner_prefix,
        )
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
