"""Ray's processes die; what the pool makes of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from merging.errors import WorkerError
from tests.support.pools import REPOSITORY, collect, ends, fail, finish, has_seen
from tests.support.stub_engine import ENGINE, make_task
from workers.messages import ShardDone, ShardProgress
from workers.ray_pool import RayPool
from workers.ray_wire import RayOptions

pytest_plugins = ["tests.support.ray_fixtures"]
pytestmark = [pytest.mark.ray, pytest.mark.slow]

_PATIENCE_SECONDS = 60.0


def _descendants(pid: int) -> dict[int, str]:
    """Process ids below one, with their names."""
    children: dict[int, list[int]] = {}
    names = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                status = dict(
                    line.split(":", 1) for line in (entry / "status").read_text().splitlines()
                )
                names[int(entry.name)] = status["Name"].strip()
                children.setdefault(int(status["PPid"]), []).append(int(entry.name))
    found, todo = {}, [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found |= {child: names[child] for child in below}
        todo += below
    return found


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _all_gone(pids: set[int]) -> bool:
    return not any(_is_running(pid) for pid in pids)


def _is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def _driver_pid(pool: RayPool) -> int:
    assert pool._driver is not None
    return pool._driver._process.pid


def _hold(pool: RayPool, job_id: str, tmp_path: Path) -> int:
    """Submit a task that waits for the file ``gate``; the process that works on it."""
    task = make_task(job_id, output=tmp_path, hold=str(tmp_path / "gate"))
    pool.submit(task)
    events = collect(pool, has_seen(ShardProgress, job_id))
    (progress,) = [event for event in events if isinstance(event, ShardProgress)]
    return int(progress.worker.rpartition(":")[2])


def _finish_again(pool: RayPool, job_id: str, tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    task = make_task(job_id, output=tmp_path, attempt=2, hold=str(tmp_path / "gate"))
    pool.submit(task)
    (end,) = ends(finish(pool))
    assert isinstance(end, ShardDone)
    assert end.attempt == 2


def test_a_killed_worker_is_worker_lost_and_the_shard_can_be_done_again(
    ray_pool: RayPool, tmp_path: Path
) -> None:
    os.kill(_hold(ray_pool, "killed", tmp_path), signal.SIGKILL)
    error = fail(ray_pool).error
    assert (error["type"], error["code"], error["retryable"]) == (
        "WorkerError",
        "worker_lost",
        True,
    )
    _finish_again(ray_pool, "killed", tmp_path)


def test_worker_processes_are_used_again(ray_pool: RayPool, tmp_path: Path) -> None:
    processes = set()
    for number in range(6):
        ray_pool.submit(make_task("reuse", number, output=tmp_path))
        (end,) = ends(finish(ray_pool))
        assert isinstance(end, ShardDone)
        processes.add(end.receipt.worker)
    assert len(processes) <= ray_pool.slots()


@pytest.mark.parametrize("victim", ["gcs_server", "raylet", "driver"])
def test_a_lost_ray_is_worker_lost_and_the_next_task_gets_a_new_one(
    ray_pool: RayPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    _hold(ray_pool, victim, tmp_path)
    driver = _driver_pid(ray_pool)
    below = _descendants(driver)
    pids = {name: pid for pid, name in below.items()} | {"driver": driver}
    os.kill(pids[victim], signal.SIGKILL)
    error = fail(ray_pool).error
    assert (error["code"], error["retryable"]) == ("worker_lost", True)
    _wait_until(lambda: _all_gone(set(below)))
    _wait_until(lambda: ray_pool.slots() == 2)
    _finish_again(ray_pool, victim, tmp_path)


def test_ray_ends_with_a_killed_controller(ray_options: RayOptions) -> None:
    script = (
        "import sys, time\n"
        "from workers.ray_pool import RayPool\n"
        "from workers.ray_wire import RayOptions\n"
        "pool = RayPool(RayOptions(num_cpus=1, temp_dir=sys.argv[1]))\n"
        "assert pool.slots() == 1\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(ray_options.temp_dir)], stdout=subprocess.PIPE
    ) as controller:
        assert controller.stdout is not None
        while b"ready" not in controller.stdout.readline():  # after log lines
            assert controller.poll() is None
        below = _descendants(controller.pid)
        assert "raylet" in below.values()
        controller.kill()
    _wait_until(lambda: _all_gone(set(below)))


def test_a_second_pool_joins_the_first_ones_ray_and_leaves_it_running(
    ray_pool: RayPool, ray_options: RayOptions, tmp_path: Path
) -> None:
    options = RayOptions(address=ray_pool.address, token_path=ray_options.token_path)
    guest = RayPool(options, engine=ENGINE)
    guest.submit(make_task("guest", output=tmp_path))
    assert isinstance(ends(finish(guest))[0], ShardDone)
    guest.close()
    ray_pool.submit(make_task("host", output=tmp_path))
    assert isinstance(ends(finish(ray_pool))[0], ShardDone)


def test_a_ray_that_cannot_be_reached_is_an_error_that_waits_before_the_next_try(
    ray_options: RayOptions, tmp_path: Path
) -> None:
    pool = RayPool(RayOptions(address="127.0.0.1:1", token_path=ray_options.token_path))
    for detail in ("nothing answers at 127.0.0.1:1", "Trying again in"):
        with pytest.raises(WorkerError, match=detail) as caught:
            pool.submit(make_task("nowhere", output=tmp_path))
        assert caught.value.retryable
    assert pool.slots() == 0
    pool.close()


def test_a_token_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    pool = RayPool(RayOptions(token_path=str(tmp_path / "file" / "token")))
    with pytest.raises(WorkerError, match="cannot be started"):
        pool.submit(make_task("tokenless", output=tmp_path))
    pool.close()


def test_ray_lets_nobody_in_without_the_token(
    ray_pool: RayPool, ray_options: RayOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ray_pool.slots() == 2
    assert ray_options.token_path is not None
    assert Path(ray_options.token_path).stat().st_mode & 0o777 == 0o600
    command = [Path(sys.executable).with_name("ray"), "health-check", "--address", ray_pool.address]
    token = Path(ray_options.token_path).read_text()
    answers = {}
    for name, value in {"right": token, "wrong": "0" * len(token)}.items():
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", value)
        answers[name] = subprocess.run(command, check=False, capture_output=True).returncode
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    answers["none"] = subprocess.run(command, check=False, capture_output=True).returncode
    assert answers == {"right": 0, "wrong": 1, "none": 1}
