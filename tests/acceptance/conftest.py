"""One service and one family of tiny models for all acceptance tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.checkpoints import Family, make_family
from tests.support.live_service import LiveService, live_service


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Two experts. Tests that change them change a copy."""
    folder = tmp_path_factory.mktemp("family")
    return make_family(folder, num_experts=2, hidden=32, vocab=64)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    """A live service that may use the folders of all tests."""
    root = tmp_path_factory.getbasetemp()
    with live_service(tmp_path_factory.mktemp("service"), root) as live:
        yield live
