"""The job store's two databases, each as the same fixture; the schema is made once per run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.jobs.sql_store import SqlJobStore, open_store
from service.jobs.tables import metadata
from tests.support.fake_clock import FakeClock
from tests.support.postgres import postgres_server

__all__ = ["postgres_server"]

BOTH = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


@pytest.fixture
def clock() -> FakeClock:
    """The store's clock."""
    return FakeClock()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database file to copy."""
    path = tmp_path_factory.mktemp("template") / "jobs.db"
    open_store(f"sqlite:///{path}").close()
    return path


@pytest.fixture(params=BOTH)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.db"
    return request.getfixturevalue("postgres_server").empty_database()


@pytest.fixture(params=BOTH)
def store(
    request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock
) -> Iterator[SqlJobStore]:
    """An empty job store."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "jobs.db")
        made = open_store(f"sqlite:///{tmp_path}/jobs.db", clock=clock, migrate=False)
    else:
        made = open_store(request.getfixturevalue("postgres_server").url, clock=clock)
        with made._engine.begin() as connection:
            for table in reversed(metadata.sorted_tables):
                connection.execute(table.delete())
    yield made
    made.close()
