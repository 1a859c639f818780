"""One live service per file of tests: each test makes jobs of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from service.jobs.sql_store import open_store
from tests.support.api import LiveApi, live_api


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("migrated") / "jobs.db"
    open_store(f"sqlite:///{path}").close()
    return path


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Iterator[LiveApi]:
    with live_api(tmp_path_factory.mktemp("api"), migrated_database) as live:
        yield live


@pytest.fixture(scope="session", autouse=True)
def _no_log_lines() -> Iterator[None]:
    """The server's threads write them at any time, also between tests."""

    def drop(*_: Any) -> Any:
        raise structlog.DropEvent

    structlog.configure(processors=[drop])
    yield
    structlog.reset_defaults()
