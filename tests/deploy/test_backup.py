"""Backups as docs/operations.md has them: taken, everything lost, restored, and all is there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from service.auth import Scope
from service.jobs.records import NewJob
from service.jobs.sql_store import SqlJobStore, open_store
from tests.support.documents import REPOSITORY, blocks
from tests.support.jobs import listed
from tests.support.postgres import running_postgres

DOCUMENT = REPOSITORY / "docs" / "operations.md"


def commands(database: str) -> tuple[str, str]:
    """What backs up, and what restores."""
    found = [b.text for b in blocks(DOCUMENT, "sh") if b.section == "Backup and restore"]
    postgres_backup, postgres_restore, sqlite_backup, sqlite_restore = found
    if database == "postgres":
        return postgres_backup, postgres_restore
    return sqlite_backup, sqlite_restore


def run(command: str, folder: Path, **variables: str) -> None:
    binaries = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"))]
    path = ":".join([*reversed(binaries), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euc", command],
        cwd=folder,
        env={**os.environ, "PATH": path, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def fill(store: SqlJobStore) -> tuple[str, str]:
    """A job and a token."""
    recipe = {"merge_method": "linear", "models": [{"model": "/models/one"}]}
    job, _ = store.submit(
        NewJob(
            recipe_source=recipe,
            recipe=recipe,
            recipe_digest="sha256:0",
            method="linear",
            methods=("linear",),
            output_uri="/models/merged",
            labels={"kept": "yes"},
        )
    )
    _, secret = store.create_token("somebody", [Scope.JOBS_READ])
    return job.id, secret


def survive(url: str, backup: Callable[[], None], lose: Callable[[], None]) -> None:
    """Fill a store, back it up, change and lose it, restore; all is as when it was backed up."""
    store = open_store(url)
    job_id, secret = fill(store)
    before = store.get(job_id)
    events = store.events(job_id, limit=100)
    backup()
    store.request_cancel(job_id)
    later, _ = fill(store)
    store.close()
    lose()
    store = open_store(url, migrate=False)
    store.ping()
    assert store.get(job_id) == before
    assert store.events(job_id, limit=100) == events
    assert store.find_token(secret) is not None
    assert later not in {job.id for job in listed(store, limit=100)}
    assert store.claim("runner", lease_seconds=30) is not None
    store.close()


def test_sqlite(tmp_path: Path) -> None:
    backup, restore = commands("sqlite")
    database = tmp_path / "mergeyard.db"

    def lose() -> None:
        database.unlink()
        run(restore, tmp_path, DATA=str(tmp_path))

    survive(f"sqlite:///{database}", lambda: run(backup, tmp_path, DATA=str(tmp_path)), lose)


@pytest.mark.postgres
def test_postgres(tmp_path: Path) -> None:
    backup, restore = commands("postgres")
    try:
        with running_postgres() as server:
            url = server.empty_database()
            plain = url.replace("postgresql+psycopg", "postgresql")

            def lose() -> None:
                server.empty_database()
                run(restore, tmp_path, DATABASE=plain)

            survive(url, lambda: run(backup, tmp_path, DATABASE=plain), lose)
    except FileNotFoundError as error:
        pytest.skip(str(error))
