"""Somebody sets the machine's clock in mid-job: same bytes, one ending, no gap.

A real service on SQLite, which knows no other clock than the machine's. Its clock alone is set, by
a library that is preloaded.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.faults.test_service_faults import finish, shard_states, wait_for
from tests.support.checkpoints import make_family
from tests.support.merges import recipe, weight_bytes
from tests.support.service_process import ServiceProcess, running_service
from tests.support.stepped_clock import SteppedClock

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HOUR = 3600


def hours_ahead(service: ServiceProcess, job_id: str) -> int:
    """How far from the truth the newest event of a job is."""
    with service.client() as client:
        events = client._call("GET", f"/v1/jobs/{job_id}/events?limit=1000")["data"]
    time = datetime.fromisoformat(events[-1]["time"])
    return round((time - datetime.now(UTC)).total_seconds() / HOUR)


def test_a_job_outlasts_steps_of_the_clock(tmp_path: Path) -> None:
    clock = SteppedClock(tmp_path)
    family = make_family(tmp_path / "models", num_experts=2, hidden=128, layers=6)
    environment = {
        **clock.environment,
        "MERGEYARD_POOL": "local",
        "MERGEYARD_LEASE_SECONDS": "3",
    }
    with running_service(tmp_path / "data", [str(tmp_path)], environment) as service:

        def submit(name: str) -> str:
            with service.client() as client:
                document = recipe(family, "wudi", steps=1000)
                options = {"max_shard_size": 300_000}
                return client.submit(document, str(tmp_path / name), options=options)["id"]

        undisturbed, _ = finish(service, submit("undisturbed"))
        job_id = submit("merged")
        for done, hours in enumerate((2, -3), 1):
            wait_for(
                lambda done=done: shard_states(service, job_id).count("succeeded") >= done,
                f"shard {done}",
            )
            clock.set(hours * HOUR)
            wait_for(
                lambda hours=hours: hours_ahead(service, job_id) == hours,
                "an event by the new time",
            )
        job, _ = finish(service, job_id)
    assert (undisturbed["state"], job["state"]) == ("succeeded", "succeeded"), job["error"]
    assert weight_bytes(tmp_path / "merged") == weight_bytes(tmp_path / "undisturbed")
