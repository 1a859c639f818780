"""The dashboard's own tests of what is not visible: folding of events, rates, filters, words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DASHBOARD = Path(__file__).parents[3] / "dashboard"


def test_the_tests_of_the_dashboard_pass() -> None:
    assert (DASHBOARD / "node_modules").exists(), "make dashboard installs what this needs."
    command = [sys.executable, str(DASHBOARD / "npm.py"), "test"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
