"""One browser for each file of tests: while one is driven, asyncio's loop is taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page

from tests.support.browser import chromium, log_in, open_page
from tests.support.checkpoints import Family, make_family
from tests.support.gated_engine import ENGINE
from tests.support.live_service import LiveService, live_service
from tests.support.merges import recipe


@dataclass(frozen=True)
class Yard:
    """A service over a folder with a family of models.

    Attributes:
        service: It runs merges behind a gate.
        root: What jobs may read and write.
        family: Below the root.
    """

    service: LiveService
    root: Path
    family: Family

    @property
    def api(self) -> httpx.Client:
        """A client that may do everything."""
        headers = {"Authorization": f"Bearer {self.service.token}"}
        return httpx.Client(base_url=self.service.url, headers=headers, timeout=30)

    def submit(self, name: str, method: str = "swudi_a", **changes: Any) -> str:
        """A new job of about five shards into ``root/name``; returns its id."""
        body = {
            "recipe": recipe(self.family, method),
            "output_uri": str(self.root / name),
            "options": {"max_shard_size": "100kB"},
        }
        with self.api as api:
            response = api.post("/v1/jobs", json={**body, **changes})
        assert response.status_code == 201, response.text
        job_id: str = response.json()["id"]
        return job_id


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    root = tmp_path_factory.mktemp("yard")
    family = make_family(root / "models", 2, layers=3)
    with live_service(root / "data", root, engine=ENGINE) as service:
        yield Yard(service, root, family)


@pytest.fixture
def page(browser: Browser, yard: Yard) -> Iterator[Page]:
    """A page of somebody who is logged in and may do everything."""
    with open_page(browser) as page:
        log_in(page, yard.service.url, yard.service.token)
        yield page
