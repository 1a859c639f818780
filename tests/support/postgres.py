"""A throw-away PostgreSQL on loopback, from the machine's own binaries."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

_USER = "mergeyard"
_PASSWORD = "only-for-this-test-run"
_FAST = "fsync=off full_page_writes=off synchronous_commit=off shared_buffers=64MB"


class PostgresServer:
    """A running server with one database at ``url``."""

    def __init__(self, port: int) -> None:
        self.url = f"postgresql+psycopg://{_USER}:{_PASSWORD}@127.0.0.1:{port}/postgres"

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


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A server for the whole run; skips, with the reason, where PostgreSQL is not installed."""
    binaries = _find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="mergeyard-postgres-"))
    port = _free_port()
    options = [f"listen_addresses=127.0.0.1 -p {port}", f"unix_socket_directories={folder}"]
    start = " ".join(f"-c {option}" for option in (*options, *_FAST.split()))
    password_file = folder / "password"
    password_file.write_text(_PASSWORD)
    if os.geteuid() == 0:  # the server refuses to run as root
        for path in (folder, password_file):
            shutil.chown(path, "postgres")
    try:
        _run(
            binaries / "initdb", f"-D {folder}/data -U {_USER} --auth-local=trust",
            f"--auth-host=scram-sha-256 --pwfile={password_file} --no-sync -E UTF8",
            "--locale=C.UTF-8",
        )  # fmt: skip
        control = binaries / "pg_ctl"
        _run(control, f"-D {folder}/data -w -t 30 -l {folder}/data/log", "-o", [start], "start")
        try:
            yield PostgresServer(port)
        finally:
            _run(control, f"-D {folder}/data -m immediate -w stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
