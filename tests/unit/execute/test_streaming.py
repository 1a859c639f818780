"""Memory does not grow with the number of experts, where a method takes them one at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from merging.execute.pieces import cut_problems, group_pieces
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.cost import group_limit
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.checkpoints import tune, write_checkpoint

MiB = 1 << 20
NUM_FILES = 3
"""Models on disk; with more experts than that each is named several times, and read as often."""


def make_models(folder: Path, rows: int, columns: int, *, layers: int = 1) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {
        f"model.layers.{n}.mlp.up_proj.weight": (
            0.02 * torch.randn(rows, columns, generator=generator)
        ).bfloat16()
        for n in range(layers)
    }
    write_checkpoint(folder / "base", base)
    for number in range(NUM_FILES):
        write_checkpoint(folder / f"expert-{number}", tune(base, seed=1 + number))


SWEEP = [
    {"name": "adam"},
    {"name": "half", "parameters": {"scale": 0.5}},
    {"name": "filter", "merge_method": "swudi_a"},
    {"name": "ridge", "merge_method": "wudi_cfs"},
]


def plan(folder: Path, num_experts: int, memory_budget: int, *, is_sweep: bool = False) -> Plan:
    document: dict[str, Any] = {
        "merge_method": "wudi",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / f"expert-{n % NUM_FILES}")} for n in range(num_experts)],
        "parameters": {"steps": 1},
        "sweep": SWEEP if is_sweep else None,
    }
    options = MergeOptions(memory_budget=memory_budget)
    output = str(folder / f"merged-{num_experts}")
    return make_plan(parse_recipe(document), open_storage(), options, output)


def test_thirty_experts_take_the_buffers_of_three(tmp_path: Path) -> None:
    make_models(tmp_path, 8192, 128, layers=3)
    tensor_bytes = 2 * 8192 * 128
    budget = plan(tmp_path, 3, 1 << 30).totals.max_host_bytes + MiB
    peaks = {}
    for num_experts in (3, 30):
        found = plan(tmp_path, num_experts, budget)
        work = found.work(0, found.digest)
        groups = list(group_pieces(list(cut_problems(work)), budget))
        assert [len(group.pieces) for group in groups] == [1, 1, 1]
        assert found.shards[0].problems[0].bytes_read > group_limit(budget), "not read at once"
        peaks[num_experts] = run_plan(found, open_storage())["peak_buffer_bytes"]
    assert max(peaks.values()) <= budget
    assert abs(peaks[30] - peaks[3]) <= tensor_bytes, (
        "at most one tensor more or less is read ahead"
    )


def merge_and_print_peak(
    folder: str, num_experts: str, memory_budget: str, is_sweep: str = ""
) -> None:
    """What the process below does: prints by how many bytes merging raised its peak."""
    torch.set_num_threads(1)
    found = plan(Path(folder), int(num_experts), int(memory_budget), is_sweep=bool(is_sweep))
    torch.ones(64, 64) @ torch.ones(64, 64)  # what torch keeps from its first product on
    before = resident_bytes("VmRSS")
    run_plan(found, open_storage())
    print(resident_bytes("VmHWM") - before)  # noqa: T201


def resident_bytes(field: str) -> int:
    """From the kernel; unlike ``ru_maxrss`` it knows nothing of the process that started this."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def peak_of_a_process(*arguments: object) -> int:
    """What a process of its own prints."""
    program = (
        "import sys; from tests.unit.execute.test_streaming import merge_and_print_peak as run;"
        " run(*sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_stays_within_what_the_plan_of_a_sweep_counts(tmp_path: Path) -> None:
    make_models(tmp_path, 8192, 1024)
    alone = plan(tmp_path, 3, 1 << 30).totals.max_host_bytes
    budget = plan(tmp_path, 3, 1 << 30, is_sweep=True).totals.max_host_bytes
    assert alone < budget < 2 * alone, "four variants do not take four times the memory"
    assert peak_of_a_process(tmp_path, 3, budget, "sweep") < 1.1 * budget


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_is_no_larger_with_thirty_experts_than_with_three(tmp_path: Path) -> None:
    rows, columns = 16384, 256
    make_models(tmp_path, rows, columns)
    budget = 128 * MiB
    peaks = {}
    for num_experts in (3, 30):
        peaks[num_experts] = peak_of_a_process(tmp_path, num_experts, budget)
    experts_bytes = 30 * 2 * rows * columns
    assert experts_bytes > 1.8 * budget, "thirty experts held at once would show"
    assert peaks[30] - peaks[3] < experts_bytes / 6
    assert peaks[30] < 1.3 * budget
