"""A throw-away PostgreSQL on loopback, from the machine's own binaries."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

_USER = "mergeyard"
_PASSWORD = "only-for-this-test-run"
_FAST = "fsync=off full_page_writes=off shared_buffers=64MB"  # processes die here, not machines


class PostgresServer:
    """A server with one database at ``url``.

    Args:
        binaries: Folder of ``initdb`` and ``pg_ctl``.
        folder: Where its data goes.
        is_durable: What was committed outlives the death of the server's processes.
    """

    def __init__(self, binaries: Path, folder: Path, *, is_durable: bool = False) -> None:
        port = _free_port()
        self.url = f"postgresql+psycopg://{_USER}:{_PASSWORD}@127.0.0.1:{port}/postgres"
        self._control, self._folder = binaries / "pg_ctl", folder
        options = [f"listen_addresses=127.0.0.1 -p {port}", f"unix_socket_directories={folder}"]
        fast = _FAST + ("" if is_durable else " synchronous_commit=off")
        self._options = " ".join(f"-c {option}" for option in (*options, *fast.split()))
        password_file = folder / "password"
        password_file.write_text(_PASSWORD)
        if os.geteuid() == 0:  # the server refuses to run as root
            for path in (folder, password_file):
                shutil.chown(path, "postgres")
        _run(
            binaries / "initdb", f"-D {folder}/data -U {_USER} --auth-local=trust",
            f"--auth-host=scram-sha-256 --pwfile={password_file} --no-sync -E UTF8",
            "--locale=C.UTF-8",
        )  # fmt: skip

    def start(self) -> None:
        """Start it, also after :meth:`kill`, and wait until it answers."""
        data = f"-D {self._folder}/data -w -t 30 -l {self._folder}/data/log"
        _run(self._control, data, "-o", [self._options], "start")

    def kill(self) -> None:
        """End all its processes at once, as a crash would."""
        lines = (self._folder / "data" / "postmaster.pid").read_text().splitlines()
        first = psutil.Process(int(lines[0]))
        family = [first, *first.children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=30)

    def stop(self) -> None:
        """End it."""
        _run(self._control, f"-D {self._folder}/data -m immediate -w stop")

    def empty_database(self) -> str:
        """Drop every table; returns the address."""
        engine = sa.create_engine(self.url, isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                connection.exec_driver_sql("DROP SCHEMA public CASCADE")
                connection.exec_driver_sql("CREATE SCHEMA public")
        finally:
            engine.dispose()
        return self.url


@contextmanager
def running_postgres(*, is_durable: bool = False) -> Iterator[PostgresServer]:
    """A started server for the length of the block.

    Raises:
        FileNotFoundError: PostgreSQL is not installed.
    """
    binaries = _find_binaries()
    if binaries is None:
        raise FileNotFoundError("PostgreSQL is not installed: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="mergeyard-postgres-"))
    try:
        server = PostgresServer(binaries, folder, is_durable=is_durable)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A server for the whole run; skips, with the reason, where PostgreSQL is not installed."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(running_postgres())
        except FileNotFoundError as error:
            pytest.skip(str(error))
        yield server


def _find_binaries() -> Path | None:
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if installed:
        return installed[-1].parent
    found = shutil.which("initdb")
    return Path(found).parent if found else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(program: Path, *arguments: str | list[str]) -> None:
    """Run a program of PostgreSQL; strings are split at blanks, lists are taken as they are."""
    words = [
        word for item in arguments for word in (item.split() if isinstance(item, str) else item)
    ]
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    # Output to a file: the server inherits it, and a pipe would not end before the server does.
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(
            [*as_user, program, *words], stdout=output, stderr=output, cwd="/", timeout=120
        )
        output.seek(0)
        if done.returncode:
            pytest.fail(f"{program.name} failed: {output.read().decode()}")
