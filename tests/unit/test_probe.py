"""Measuring this machine; what comes out is checked for sense, not for speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merging.probe import measure_rates


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads that take no time."""
    for name, value in {"_LARGEST": 128, "_TIMED_FLOPS": 1, "_ENTRIES": 1 << 17}.items():
        monkeypatch.setattr(f"merging.probe.{name}", value)
    monkeypatch.setattr("merging.probe._FILE_BYTES", 1 << 20)


def test_everything_is_measured(tmp_path: Path) -> None:
    rates = measure_rates("cpu", "cpu", 1, tmp_path / "cache")
    assert (rates.device, rates.threads) == ("cpu", 1)
    assert rates.steps[0][0] == 64
    sizes = [size for size, _ in rates.steps]
    assert sizes == sorted(sizes)
    speeds = [speed for _, speed in rates.steps]
    for speed in (*speeds, rates.operations, rates.entries, rates.read["file"]):
        assert 1e5 < speed < 1e16
    assert 1e5 < rates.written["file"] < 1e12
    assert list((tmp_path / "cache").iterdir()) == []


def test_sizes_grow_until_a_step_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merging.probe._STEP_SECONDS", 0.0)
    assert [size for size, _ in measure_rates("cpu", "cpu", 1).steps] == [64]
    monkeypatch.setattr("merging.probe._STEP_SECONDS", 1e9)
    assert [size for size, _ in measure_rates("cpu", "cpu", 1).steps] == [64, 128]


def test_without_a_folder_storage_stays_unknown(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for folder in (None, tmp_path / "file"):
        rates = measure_rates("cpu", "cpu", 1, folder)
        assert (rates.read, rates.written) == ({}, {})


def test_threads_and_random_state_are_as_before() -> None:
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    measure_rates("cpu", "cpu", threads + 1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
