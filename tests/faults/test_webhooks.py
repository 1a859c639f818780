"""A service that is killed after a job has ended, and before it has told anybody."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from service.client import Client
from tests.support.checkpoints import make_family
from tests.support.receiver import Answer, receiver, wait_until
from tests.support.serving import Served, served

ENDPOINTS = "/v1/webhook-endpoints"


def deliveries(service: Served, endpoint: str) -> dict[str, dict]:
    """By type."""
    page = service.client.get(f"{ENDPOINTS}/{endpoint}/deliveries").json()
    return {item["type"]: item for item in page["data"]}


@pytest.mark.slow
def test_what_was_committed_before_a_kill_is_told_after_it(tmp_path: Path) -> None:
    family = make_family(tmp_path / "models", num_experts=2)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(expert)} for expert in family.experts],
        "parameters": {"weight": 0.5},
    }
    never = threading.Event()
    settings = {"webhook_allow_loopback": "true", "public_url": "https://merge.example.com"}
    with receiver() as there:
        there.answers = [Answer(hang=never)]  # of job.started: the others wait behind it
        with served(tmp_path, **settings) as service:
            made = service.client.post(ENDPOINTS, json={"url": there.url}).json()
            with Client(service.url, service.client.headers["authorization"].split()[1]) as client:
                job = client.wait(client.submit(recipe, str(tmp_path / "merged"))["id"])
            assert job["state"] == "succeeded"
            waiting = deliveries(service, made["id"])
            assert {item["state"] for item in waiting.values()} == {"pending"}
            assert waiting["job.succeeded"]["attempts"] == 0
            service.process.kill()
            service.process.wait()
        with served(tmp_path, **settings) as service:
            told = ("job.output_committed", "job.succeeded")
            wait_until(
                lambda: all(
                    deliveries(service, made["id"])[kind]["state"] == "delivered" for kind in told
                )
            )
            metrics = service.client.get("/metrics").text
            assert service.terminate() == 0
        never.set()
    after = there.received[1:]
    assert sorted(request.message["type"] for request in after) == sorted(told)
    for request in after:
        request.verify(made["secret"])  # the key outlived the process
        assert request.message["data"]["job_id"] == job["id"]
        assert request.message_id == waiting[request.message["type"]]["message_id"]
    assert 'mergeyard_webhook_deliveries_total{outcome="delivered"} 2.0' in metrics
    log = (tmp_path / "service.log").read_text()
    assert made["secret"] not in log
