"""Every answer has the shape of its kind, and every example in the OpenAPI document works."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from service.api.objects import (
    EventObject,
    JobCounts,
    JobDetail,
    JobObject,
    Page,
    ShardObject,
)
from service.app import describe_api
from service.jobs.records import JobIntegration
from service.jobs.states import JobState
from tests.integration.api.test_problems import fill
from tests.support.api import LiveApi

NOT_UNDERSTOOD = {"malformed_request", "invalid_request", "unknown_field"}
WITHOUT_TIME = {"method", "shard"}  # declared in code, or part of a job


def resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema itself: behind a reference, and without the alternative of null."""
    for option in schema.get("anyOf", ()):
        if option.get("type") != "null":
            return resolve(document, option)
    if "$ref" in schema:
        return document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def bodies(api: LiveApi) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for method, path, operation in api.operations():
        if "requestBody" in operation:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            yield method, path, resolve(api.openapi, schema)


def answers(api: LiveApi) -> Iterator[tuple[str, dict[str, Any]]]:
    """Operation id and schema of every successful answer in JSON."""
    for _, _, operation in api.operations():
        for status, response in operation["responses"].items():
            schema = response.get("content", {}).get("application/json", {}).get("schema")
            if status.startswith("2") and schema:
                yield operation["operationId"], resolve(api.openapi, schema)


def test_the_document_needs_no_service(api: LiveApi) -> None:
    assert describe_api() == api.openapi


def test_every_body_has_examples_that_are_understood(api: LiveApi) -> None:
    count = 0
    for method, path, schema in bodies(api):
        assert schema.get("examples"), (method, path)
        for example in schema["examples"]:
            answer = api.admin.request(method, fill(path), json=example)
            assert answer.status_code < 500, (path, answer.text)
            if answer.is_error:
                assert answer.json()["code"] not in NOT_UNDERSTOOD, (path, answer.text)
            count += 1
    assert count > 8


def test_every_body_refuses_fields_that_it_does_not_know(api: LiveApi) -> None:
    for method, path, schema in bodies(api):
        assert schema["additionalProperties"] is False, (method, path)


def test_every_object_says_what_it_is_and_things_have_an_id_and_a_time(api: LiveApi) -> None:
    seen = set()
    for name, schema in answers(api):
        if name in ("service.health", "service.ready", "jobs.report"):
            continue  # of probes, and a document of its own
        properties = schema["properties"]
        kind = properties["object"]["const"]
        if kind == "list":
            assert set(properties) == {"object", "data", "next_cursor", "next_url"}, name
        elif "id" in properties and kind not in WITHOUT_TIME:
            assert "created_at" in properties, name
            seen.add(kind)
    assert {"job", "plan", "token", "session"} <= seen


def test_times_are_called_so(api: LiveApi) -> None:
    for schema in api.openapi["components"]["schemas"].values():
        for name, field in schema.get("properties", {}).items():
            kinds = [field, *field.get("anyOf", ())]
            if any(kind.get("format") == "date-time" for kind in kinds):
                assert name == "time" or name.endswith(("_at", "_until")), name


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED])
def test_bodies_that_are_made_in_one_pass_are_those_of_their_models(
    api: LiveApi, state: JobState
) -> None:
    job, _ = api.bring_to(state, integrations=(JobIntegration("mlflow", {"model": "m"}),))
    for path, model in {
        f"/v1/jobs/{job.id}": JobDetail,
        f"/v1/jobs/{job.id}/events": Page[EventObject],
        f"/v1/jobs/{job.id}/shards": Page[ShardObject],
        "/v1/jobs": Page[JobObject],
        "/v1/jobs/counts": JobCounts,
    }.items():
        response = api.admin.get(path)
        assert json.loads(model.model_validate_json(response.content).model_dump_json()) == (
            response.json()
        ), path
