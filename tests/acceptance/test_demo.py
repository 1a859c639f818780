"""The demo from end to end, with models that learn little, as its users run it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
PATIENCE_SECONDS = 240
ROWS = ["base", "python expert", "cpp expert", "json expert", "Plain average", "TIES", "WUDI"]


@pytest.fixture(scope="module")
def cache() -> Iterator[Path]:
    """Where the models of all tests are; the first that needs them makes them."""
    with tempfile.TemporaryDirectory(prefix="demo-cache-") as folder:
        yield Path(folder)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """What the demo takes for temporary files. A short path: sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        yield Path(folder)


def start(cache: Path, temporary: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "examples.demo", "--tiny", "--cache-dir", str(cache), *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"TMPDIR": str(temporary), "COLUMNS": "100", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_nothing_is_left(temporary: Path) -> None:
    # Ray's folder is one for all runs, and torch keeps a cache: those may stay.
    assert [*temporary.glob("mergeyard-demo-*"), *temporary.glob("mergeyard-s3-*")] == []
    left = [p.info for p in psutil.process_iter(["cmdline"]) if _mentions(p, str(temporary))]
    assert left == []


def _mentions(process: psutil.Process, text: str) -> bool:
    return any(text in word for word in process.info["cmdline"] or ())


@pytest.mark.s3
def test_merges_on_s3_and_shows_a_row_for_every_model(cache: Path, temporary: Path) -> None:
    process = start(cache, temporary)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, output
    assert "s3://" in output
    table = output[output.index("Loss on held-out text") :]
    assert [row for row in ROWS if row not in table] == []
    assert output.count("succeeded") >= 4
    assert_nothing_is_left(temporary)


def test_merges_in_plain_folders_with_the_models_of_an_earlier_run(
    cache: Path, temporary: Path
) -> None:
    for _ in range(2):
        process = start(cache, temporary, "--local-files")
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, output
        assert "s3://" not in output
    assert "kept from an earlier run" in output
    assert_nothing_is_left(temporary)


@pytest.mark.s3
def test_ctrl_c_ends_everything_that_was_started(cache: Path, temporary: Path) -> None:
    process = start(cache, temporary)
    assert process.stdout is not None
    deadline = time.monotonic() + PATIENCE_SECONDS
    for line in process.stdout:
        assert time.monotonic() < deadline
        if "jobs at once" in line:
            break
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, output
    assert "Interrupted" in output
    assert "Traceback" not in output
    assert_nothing_is_left(temporary)
