"""Integrations of a job by way of the API. The one here is a stand-in; MLflow has its own tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from merging.errors import MergeError
from service.integrations.catalogue import make_integrations
from service.jobs.outbox import AttemptOutcome, DeliveryState, TakenDelivery
from service.jobs.records import JobIntegration
from service.jobs.states import JobState
from service.settings import load_settings
from tests.integration.api.test_problems import check_problem
from tests.support.api import RECIPE, LiveApi, live_api

MLFLOW = "https://mlflow.example"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Iterator[LiveApi]:
    folder = tmp_path_factory.mktemp("integrations")
    settings = {"mlflow_url": MLFLOW, "integrations": ["mlflow"]}
    with live_api(folder, migrated_database, **settings) as live:
        yield live


def shown(api: LiveApi, job_id: str) -> list[dict[str, Any]]:
    return api.admin.get(f"/v1/jobs/{job_id}").json()["integrations"]


def take_of(api: LiveApi, job_id: str) -> TakenDelivery:
    """A delivery about this job; those of earlier tests are taken out of the way."""
    while (taken := api.store.take_delivery(3600)) is not None:
        if taken.delivery.data["job_id"] == job_id:
            return taken
    pytest.fail("nothing is told of the job")


def pending(model_name: str | None = None) -> dict[str, Any]:
    return {
        "name": "mlflow",
        "options": {"model_name": model_name},
        "state": "pending",
        "url": None,
        "error": None,
    }


def test_a_job_has_the_integrations_of_the_deployment_or_its_own(api: LiveApi) -> None:
    assert api.submit("default")["integrations"] == [pending()]
    assert api.submit("none", integrations=[])["integrations"] == []
    own = [{"name": "mlflow", "options": {"model_name": "assistant"}}]
    job = api.submit("own", integrations=own)
    assert job["integrations"] == [pending("assistant")]
    again = api.admin.post(f"/v1/jobs/{job['id']}/resubmit", json={"output_uri": "mem://out/2"})
    assert again.json()["integrations"] == [pending("assistant")]


@pytest.mark.parametrize(
    ("asked", "pointer"),
    [
        ([{"name": "wandb"}], "/integrations/0/name"),
        ([{"name": "mlflow"}, {"name": "mlflow"}], "/integrations/1/name"),
        ([{"name": "mlflow", "options": {"model": "x"}}], "/integrations/0/options/model"),
        (
            [{"name": "mlflow", "options": {"model_name": "a/b"}}],
            "/integrations/0/options/model_name",
        ),
    ],
)
def test_what_this_deployment_cannot_do_is_refused_at_once(
    api: LiveApi, asked: list[dict[str, Any]], pointer: str
) -> None:
    body = {"recipe": RECIPE, "output_uri": "mem://out/refused", "integrations": asked}
    problem = check_problem(api.admin.post("/v1/jobs", json=body), "bad_integration")
    assert [error["pointer"] for error in problem["errors"]] == [pointer]


def test_of_a_job_that_came_to_nothing_nothing_is_told(api: LiveApi) -> None:
    asked = (JobIntegration("mlflow", {"model_name": "x"}),)
    job, _ = api.bring_to(JobState.FAILED, integrations=asked)
    assert shown(api, job.id)[0]["state"] == "skipped"
    api.store.retry(job.id)
    assert shown(api, job.id)[0]["state"] == "pending"


def test_an_error_is_a_problem_and_the_log_tells_it(api: LiveApi) -> None:
    asked = (JobIntegration("mlflow", {"model_name": "x"}),)
    job, _ = api.bring_to(JobState.SUCCEEDED, integrations=asked)
    taken = take_of(api, job.id)
    refused = AttemptOutcome(state=DeliveryState.FAILED, error="MLflow answered 400.")
    api.store.finish_attempt(taken.delivery, refused)
    (entry,) = shown(api, job.id)
    assert entry["state"] == "failed"
    assert (entry["error"]["code"], entry["error"]["status"]) == ("integration_failed", 502)
    assert entry["error"]["detail"] == "MLflow answered 400."
    log = api.admin.get(f"/v1/jobs/{job.id}/logs").text
    assert "mlflow failed: MLflow answered 400. [integration_failed]" in log


def test_a_stream_ends_although_an_integration_finished_after_the_job(api: LiveApi) -> None:
    asked = (JobIntegration("mlflow", {"model_name": "x"}),)
    job, _ = api.bring_to(JobState.SUCCEEDED, integrations=asked)
    taken = take_of(api, job.id)
    made = AttemptOutcome(state=DeliveryState.DELIVERED, url=f"{MLFLOW}/x")
    api.store.finish_attempt(taken.delivery, made)
    last = api.store.get(job.id).event_seq
    for after in (0, last - 1):
        response = api.admin.get(
            f"/v1/jobs/{job.id}/events?after={after}", headers={"Accept": "text/event-stream"}
        )
        assert f"id: {last}" in response.text
        assert "event: integration.finished" in response.text


def test_a_default_that_is_not_configured_stops_the_start() -> None:
    settings = load_settings(storage_roots=["mem://"], integrations=["mlflow"])
    with pytest.raises(MergeError, match="MERGEYARD_INTEGRATIONS") as caught:
        make_integrations(settings)
    assert caught.value.code == "bad_setting"
