"""Benchmarks run and record what a figure needs beside it. How fast is not asserted anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import benchmarks.__main__
from benchmarks import merge, precision, service, solver


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Benchmarks set the threads of their process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_solver_records_rates_of_each_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / "solver.json"
    solver.main(
        ["--shapes", "32x48", "4x64", "--experts", "3", "--rounds", "1", "--json", str(path)]
    )
    record = json.loads(path.read_text())
    assert {"date", "command", "machine", "processor", "device", "threads", "torch"} <= set(record)
    square, wide = record["figures"]["steps"]
    assert (square["form"], wide["form"]) == ("gram", "rows")
    assert square["step_flops"] == 2 * 32 * 48 * 48
    assert wide["step_flops"] == 4 * 3 * 4 * 4 * 64
    assert square["share_of_product_rate"] > 0
    assert set(record["figures"]["merges"][0]["seconds"]) == {"wudi", *solver.DIRECT}
    assert "32x48" in capsys.readouterr().out


def test_a_shape_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        solver.main(["--shapes", "32"])
    assert "'32' is not rows x columns" in capsys.readouterr().err


def test_emulated_precisions_rank_as_documented(tmp_path: Path) -> None:
    path = tmp_path / "precision.json"
    precision.main(["--shapes", "24x32x3", "--steps", "60", "--json", str(path)])
    figures = json.loads(path.read_text())["figures"]
    (found,), (scaled,) = figures["precision"].values(), figures["scale"].values()
    assert scaled["0.1, auto"] < 1e-3 < scaled["0.1, fixed"]
    by_name = {name: measured["update"] for name, measured in found.items()}
    assert by_name["float32, sums (highest)"] < by_name["split bfloat16 (high)"] < 1e-3
    assert by_name["split bfloat16 (high)"] < by_name["TF32 (medium)"] / 5
    assert by_name["TF32 (medium)"] < by_name["bfloat16, not offered"]


def test_benchmarks_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.__main__.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("solver ") and line.endswith(".") for line in lines)
    assert not any(line.startswith(("records", "__main__")) for line in lines)
    assert benchmarks.__main__.main(["nothing"]) == 2


@pytest.mark.slow
def test_merges_are_measured_as_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """mergekit's side needs an environment of its own; ``make parity`` makes one."""
    path = tmp_path / "merge.json"
    options = ["--layers", "0", "--vocab", "512", "--ours-only", "--folder", str(tmp_path)]
    merge.main([*options, "--methods", "linear", "slerp", "--json", str(path)])
    figures = json.loads(path.read_text())["figures"]
    assert figures["methods"]["slerp"]["bytes"]["read"] == 2 * figures["model_bytes"]
    for sides in (figures["starting"], *figures["methods"].values()):
        assert sides["ours"]["cpu_seconds"] > 0
        assert sides["ours"]["peak_bytes"] > sides["ours"]["peak_anonymous_bytes"] > 1e7
    assert 0 < figures["floor"]["share_of_cpu"] < 1
    assert "task_arithmetic" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_service_records_what_readers_and_watchers_saw(tmp_path: Path) -> None:
    path = tmp_path / "service.json"
    service.main(
        ["--jobs", "6", "--watchers", "3", "--reads-per-second", "20", "--json", str(path)]
    )
    figures = json.loads(path.read_text())["figures"]
    assert figures["shards"].startswith("stub")
    assert figures["ended"] == "all jobs were done"
    assert figures["jobs"] == {"asked": 6, "accepted": 6, "done": 6}
    assert figures["failures"] == {}
    assert figures["events_per_second"] > 0
    assert figures["all_reads"]["p99_ms"] >= figures["all_reads"]["p50_ms"] > 0
    assert figures["lines"][-1]["jobs_done"] == 6


def test_a_load_that_time_cuts_short_says_so(tmp_path: Path) -> None:
    path = tmp_path / "service.json"
    arguments = ["--jobs", "100000", "--jobs-per-second", "1", "--watchers", "1", "--seconds", "1"]
    service.main([*arguments, "--reads-per-second", "5", "--json", str(path)])
    figures = json.loads(path.read_text())["figures"]
    assert figures["ended"] == "time was up"
    assert figures["jobs"]["done"] <= figures["jobs"]["accepted"] < figures["jobs"]["asked"]
