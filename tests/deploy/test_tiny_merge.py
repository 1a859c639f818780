"""The program of ``helm test``, against a real service."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.helm import CHART
from tests.support.live_service import live_service


@pytest.mark.slow
def test_it_merges_and_leaves_nothing(tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    with live_service(tmp_path / "data", root) as service:
        variables = {
            "MERGEYARD_URL": service.url,
            "MERGEYARD_TOKEN": service.token,
            "MERGEYARD_TEST_ROOT": str(root),
        }
        done = subprocess.run(
            [sys.executable, CHART / "files" / "tiny_merge.py"],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the merged model is right" in done.stdout
    assert [path for path in root.rglob("*") if path.is_file()] == []
