"""The runner's bench, on a database that is migrated once per run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.jobs.sql_store import open_store
from tests.support.fake_clock import FakeClock
from tests.support.runner_bench import Bench


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database file to copy."""
    path = tmp_path_factory.mktemp("template") / "jobs.db"
    open_store(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def bench(migrated: Path, tmp_path: Path) -> Iterator[Bench]:
    """Everything that a runner needs."""
    shutil.copy(migrated, tmp_path / "jobs.db")
    clock = FakeClock()
    store = open_store(f"sqlite:///{tmp_path}/jobs.db", clock=clock, migrate=False)
    yield Bench(store, clock)
    store.close()
