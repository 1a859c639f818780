"""One local Ray for all tests that need it: it takes seconds to start."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator

import pytest

from tests.support.pools import REPOSITORY
from tests.support.stub_engine import ENGINE
from workers.ray_pool import RayPool
from workers.ray_wire import RayOptions


@pytest.fixture(scope="session")
def ray_options() -> Iterator[RayOptions]:
    """Two slots, and a short folder of its own (Unix sockets allow 107 characters)."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield RayOptions(num_cpus=2, temp_dir=folder, token_path=f"{folder}/secrets/token")


@pytest.fixture(scope="session")
def start_ray(ray_options: RayOptions) -> Callable[[], RayPool]:
    """Makes a connected pool that runs the stub engine, from a folder that is not ours."""

    def start() -> RayPool:
        pool = RayPool(ray_options, engine=ENGINE)
        with pytest.MonkeyPatch.context() as patch, contextlib.chdir("/"):
            patch.setenv("PYTHONPATH", str(REPOSITORY))  # workers shall find tests.support
            assert pool.slots() == 2
        return pool

    return start


@pytest.fixture(scope="session")
def ray_pool(start_ray: Callable[[], RayPool]) -> Iterator[RayPool]:
    """The shared pool; a test leaves nothing in flight."""
    pool = start_ray()
    yield pool
    pool.close()
