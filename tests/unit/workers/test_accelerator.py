"""Device choice."""

from __future__ import annotations

import pytest
import torch

from merging.errors import WorkerError
from merging.execute.shard_run import describe_device
from workers.accelerator import choose_device


@pytest.fixture(params=[0, 2])
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Pretends that this machine has so many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary GPU")
    return int(request.param)


def test_auto_takes_the_first_gpu_else_the_cpu(gpus: int) -> None:
    assert choose_device("auto") == ("cuda:0" if gpus else "cpu")


@pytest.mark.parametrize(("wanted", "number"), [("cuda", 0), ("cuda:1", 1), ("cuda:7", 7)])
def test_a_gpu_that_is_asked_for_must_be_there(gpus: int, wanted: str, number: int) -> None:
    if number < gpus:
        assert choose_device(wanted) == f"cuda:{number}"
        return
    with pytest.raises(WorkerError, match=f"{gpus} CUDA device") as caught:
        choose_device(wanted)
    assert caught.value.code == "device_unavailable"


@pytest.mark.parametrize("wanted", ["tpu", "cuda:", "cuda:-1", "CPU", ""])
def test_an_unknown_device_is_refused(wanted: str) -> None:
    with pytest.raises(WorkerError, match="auto, cpu, cuda or cuda:N"):
        choose_device(wanted)


def test_devices_are_described_as_people_know_them(gpus: int) -> None:
    assert describe_device("cpu") == "cpu"
    assert describe_device("cuda:1") == "cuda:1 Imaginary GPU"
