"""Methods that look at whole tensors or rows merge tensors many times larger than the budget."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from merging.execute.memory import give_back_freed_memory
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.unit.execute.test_streaming import make_models, resident_bytes

BUDGET = 48 << 20
ROWS, COLUMNS = 32768, 1024
PARAMETERS: dict[str, dict[str, Any]] = {
    "breadcrumbs": {"density": 0.9, "rescale": True},
    "della": {"density": 0.5},
    "sce": {"select_topk": 0.5},
    "ties": {"density": 0.2, "rescale": True},
}


def merge_and_print_peak(folder: str, method: str) -> None:
    """What the process below does: prints by how many bytes merging raised its peak."""
    give_back_freed_memory()  # before there are threads, as the command line does
    torch.set_num_threads(1)
    document = {
        "merge_method": method,
        "base_model": f"{folder}/base",
        "models": [{"model": f"{folder}/expert-{number}"} for number in range(3)],
        "parameters": PARAMETERS[method],
    }
    options = MergeOptions(memory_budget=BUDGET)
    found = make_plan(parse_recipe(document), open_storage(), options, f"{folder}/{method}")
    before = resident_bytes("VmRSS")
    run_plan(found, open_storage())
    print(resident_bytes("VmHWM") - before)  # noqa: T201


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_stays_within_the_budget(tmp_path: Path) -> None:
    make_models(tmp_path, ROWS, COLUMNS)
    assert 5 * 2 * ROWS * COLUMNS > 6 * BUDGET, "inputs and result would show"
    program = (
        "import sys; from tests.unit.execute.test_tiles import merge_and_print_peak as run;"
        " run(*sys.argv[1:])"
    )
    for method in PARAMETERS:
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), method],
            env={**os.environ, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(done.stdout) < 1.6 * BUDGET, method
