"""What the Ray driver makes of Ray's answers, without a Ray."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)

from merging.errors import StorageError, WorkerError
from workers.ray_driver import count_slots, error_from_ray
from workers.ray_task import stream_shard
from workers.ray_wire import RayOptions


def _node(alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    ("nodes", "options", "gpus_per_task", "expected"),
    [
        ([_node(CPU=4.0), _node(CPU=3.0)], RayOptions(cpus_per_task=2), 0.0, 3),
        ([_node(CPU=8.0), _node(CPU=8.0, GPU=2.0)], RayOptions(), 1.0, 2),
        ([_node(CPU=16.0, GPU=1.0)], RayOptions(), 0.1, 10),
        ([_node(CPU=8.0, memory=5e9)], RayOptions(memory_per_task=2 * 10**9), 0.0, 2),
        ([_node(alive=False, CPU=8.0)], RayOptions(), 0.0, 0),
        ([_node()], RayOptions(), 0.0, 0),
    ],
    ids=["no-sharing-between-nodes", "gpus", "fractions", "memory", "dead-node", "runner-node"],
)
def test_slots_are_what_fits_on_each_machine(
    nodes: list[dict[str, Any]], options: RayOptions, gpus_per_task: float, expected: int
) -> None:
    assert count_slots(nodes, options, gpus_per_task) == expected


def _task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("stream_shard", "trace", cause).as_instanceof_cause()


@pytest.mark.parametrize(
    ("fault", "code", "retryable"),
    [
        (WorkerCrashedError(), "worker_lost", True),
        (NodeDiedError("gone"), "worker_lost", True),
        (OutOfMemoryError("full"), "out_of_memory", True),
        (TaskCancelledError(), "cancelled", False),
        (_task_error(TaskCancelledError()), "cancelled", False),
        (_task_error(StorageError("slow", code="throttled", retryable=True)), "throttled", True),
        (_task_error(ModuleNotFoundError("workers.ray_task")), "wrong_version", False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_ray_faults_become_our_errors(fault: Exception, code: str, retryable: bool) -> None:
    error = error_from_ray(fault)
    assert (error.code, error.retryable) == (code, retryable)
    assert "trace" not in error.detail


def test_a_task_of_another_version_is_refused() -> None:
    with pytest.raises(WorkerError, match="same version of Mergeyard") as caught:
        next(stream_shard(b'{"job_id": 7}', "nothing:here"))
    assert caught.value.code == "wrong_version"
