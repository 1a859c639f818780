"""Merged models in MLflow's model registry: a real server on SQLite, and the whole way to it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import structlog

from service.app import utc_now
from service.integrations.base import IntegrationError, JobAnnouncement
from service.integrations.mlflow import Mlflow
from service.integrations.telling import Teller
from service.jobs.outbox import Announcement
from service.jobs.records import EventType, IntegrationState, JobIntegration, JobRecord
from service.jobs.sql_store import SqlJobStore, open_store
from service.jobs.states import JobState
from service.webhooks.address_guard import AddressGuard
from service.webhooks.delivery import Caller
from service.webhooks.secrets import SecretKeys
from service.webhooks.sender import Sender
from tests.support.jobs import bring_to, tiny_plan
from tests.support.mlflow_server import MlflowServer, mlflow_server
from tests.support.receiver import wait_until

pytestmark = pytest.mark.timeout(900)  # the first run installs MLflow

INPUTS = (
    {"uri": "s3://models/base", "role": "base", "digest": "sha256:b"},
    {"uri": "s3://models/chat", "role": "expert", "digest": "sha256:c"},
    {"uri": "s3://models/code", "role": "expert", "digest": "sha256:d"},
)


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_log_lines() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlJobStore]:
    made = open_store(f"sqlite:///{tmp_path}/jobs.db")
    yield made
    made.close()


def announcement(
    store: SqlJobStore, output_uri: str, kind: Announcement = Announcement.JOB_SUCCEEDED, **o: Any
) -> JobAnnouncement:
    job, _ = bring_to(store, JobState.SUCCEEDED, output_uri=output_uri, inputs=INPUTS)
    job = msgspec.structs.replace(job, plan_digest=tiny_plan().digest)
    return JobAnnouncement("evt_1", kind, datetime.now(UTC), job, o)


def versions(mlflow: MlflowServer, name: str) -> list[dict[str, Any]]:
    """As MLflow's own client sees them."""
    program = f"""
import json
found = client.search_model_versions("name='{name}'")
shown = [{{"version": str(v.version), "source": v.source, "tags": v.tags}} for v in found]
print(json.dumps(shown))
"""
    return json.loads(mlflow.client(program).splitlines()[-1])


@pytest.mark.slow
def test_a_merge_becomes_one_version_by_reference(mlflow: MlflowServer, store: SqlJobStore) -> None:
    event = announcement(store, "s3://models/merged-assistant")
    integration = Mlflow(mlflow.url)
    url = integration.on_event(event)
    assert url == f"{mlflow.url}/#/models/merged-assistant/versions/1"
    assert integration.on_event(event) == url  # told twice
    (version,) = versions(mlflow, "merged-assistant")
    job = event.job
    assert version["source"] == job.output_uri
    assert version["tags"] == {
        "mergeyard.job_id": job.id,
        "mergeyard.method": job.method,
        "mergeyard.recipe_digest": job.recipe_digest,
        "mergeyard.plan_digest": job.plan_digest,
        "mergeyard.output_digest": "sha256:out",
        "mergeyard.input.0": "base s3://models/base sha256:b",
        "mergeyard.input.1": "expert s3://models/chat sha256:c",
        "mergeyard.input.2": "expert s3://models/code sha256:d",
    }


@pytest.mark.slow
def test_the_variants_of_a_sweep_are_versions_of_one_model(
    mlflow: MlflowServer, store: SqlJobStore
) -> None:
    event = announcement(store, "s3://models/swept")
    variants = [
        {"name": name, "uri": f"s3://models/swept/{name}", "method": method, "digest": f"d-{name}"}
        for name, method in (("a", "wudi"), ("b", "swudi_a"))
    ]
    output = {"uri": event.job.output_uri, "digest": "sha256:all", "variants": variants}
    job = msgspec.structs.replace(event.job, output=output)
    event = dataclasses.replace(event, job=job)
    for _ in range(2):  # told twice
        assert Mlflow(mlflow.url).on_event(event) == f"{mlflow.url}/#/models/swept/versions/1"
    found = sorted(versions(mlflow, "swept"), key=lambda version: version["version"])
    assert [version["source"] for version in found] == [v["uri"] for v in variants]
    for version, variant in zip(found, variants, strict=True):
        assert version["tags"]["mergeyard.variant"] == variant["name"]
        assert version["tags"]["mergeyard.method"] == variant["method"]
        assert version["tags"]["mergeyard.output_digest"] == variant["digest"]


@pytest.mark.slow
def test_the_next_merge_is_the_next_version(mlflow: MlflowServer, store: SqlJobStore) -> None:
    for number in (1, 2):
        event = announcement(store, f"s3://models/run-{number}", model_name="it's an assistant")
        url = Mlflow(mlflow.url).on_event(event)
        assert url is not None
        assert url.endswith(f"/versions/{number}")
        assert "it%27s%20an%20assistant" in url


@pytest.mark.slow
def test_only_success_is_registered(mlflow: MlflowServer, store: SqlJobStore) -> None:
    for kind in set(Announcement) - {Announcement.JOB_SUCCEEDED}:
        event = announcement(store, "s3://models/never", kind)
        assert Mlflow(mlflow.url).on_event(event) is None
    assert versions(mlflow, "never") == []


@pytest.mark.slow
def test_what_mlflow_refuses_is_not_tried_again(mlflow: MlflowServer, store: SqlJobStore) -> None:
    """Servers refuse folders of this machine as sources."""
    with pytest.raises(IntegrationError, match="MLflow answered 400") as caught:
        Mlflow(mlflow.url).on_event(announcement(store, "/models/merged"))
    assert not caught.value.retryable


def test_a_server_that_is_away_is_worth_another_try(store: SqlJobStore) -> None:
    with pytest.raises(IntegrationError, match="does not answer") as caught:
        Mlflow("http://127.0.0.1:9").on_event(announcement(store, "s3://models/x"))
    assert caught.value.retryable


@pytest.mark.parametrize(
    ("credentials", "header"),
    [("a-token", "Bearer a-token"), ("user:secret", "Basic dXNlcjpzZWNyZXQ="), ("", None)],
)
def test_credentials_are_sent_and_not_told(
    store: SqlJobStore, credentials: str, header: str | None
) -> None:
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return httpx.Response(401, text="who are you?")

    integration = Mlflow(
        "https://mlflow.example", credentials, transport=httpx.MockTransport(answer)
    )
    with pytest.raises(IntegrationError, match="not MLflow") as caught:
        integration.on_event(announcement(store, "s3://models/x"))
    assert seen == [header]
    assert caught.value.retryable
    assert "secret" not in str(caught.value)


# -- the whole way


def sender(store: SqlJobStore, url: str) -> Sender:
    return Sender(
        store,
        Caller(AddressGuard()),
        SecretKeys([], Path("/nowhere")),
        tell_integration=Teller({"mlflow": Mlflow(url)}, store.get).tell,
        public_url="",
        clock=utc_now,
        poll_seconds=0.01,
    )


def told(store: SqlJobStore, job_id: str) -> JobIntegration:
    (entry,) = store.get(job_id).integrations
    return entry


def submit(store: SqlJobStore, name: str) -> JobRecord:
    asked = (JobIntegration("mlflow", {"model_name": name}),)
    job, _ = bring_to(
        store, JobState.SUCCEEDED, output_uri=f"s3://models/{name}", integrations=asked
    )
    return job


@pytest.mark.slow
def test_a_job_that_asks_for_it_is_registered_after_it_has_ended(
    mlflow: MlflowServer, store: SqlJobStore
) -> None:
    job = submit(store, "whole-way")
    assert told(store, job.id).state == IntegrationState.PENDING
    worker = sender(store, mlflow.url)
    worker.start()
    wait_until(lambda: told(store, job.id).state != IntegrationState.PENDING)
    worker.stop()
    entry = told(store, job.id)
    assert (entry.state, entry.error) == (IntegrationState.SUCCEEDED, None)
    assert entry.url == f"{mlflow.url}/#/models/whole-way/versions/1"
    last = store.events(job.id)[-1]
    assert last.type == EventType.INTEGRATION_FINISHED
    assert last.data == {"name": "mlflow", "state": "succeeded", "url": entry.url, "error": None}
    assert store.get(job.id).state == JobState.SUCCEEDED
    assert len(versions(mlflow, "whole-way")) == 1


def test_a_failure_is_shown_and_leaves_the_job_as_it_is(store: SqlJobStore) -> None:
    job = submit(store, "away")
    worker = sender(store, "http://127.0.0.1:9")
    worker.start()
    wait_until(lambda: told(store, job.id).error)
    worker.stop()
    entry = told(store, job.id)
    assert entry.state == IntegrationState.PENDING  # to be tried again
    assert entry.error == {
        "code": "integration_failed",
        "detail": "MLflow does not answer (ConnectError).",
    }
    after = store.get(job.id)
    assert (after.state, after.output) == (JobState.SUCCEEDED, job.output)
    kinds = [event.type for event in store.events(job.id)]
    assert kinds.count(EventType.JOB_FINISHED) == 1
    assert EventType.INTEGRATION_FINISHED not in kinds
