"""Submitting, listing, reading, cancelling and changing jobs."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import yaml

from service.auth import Scope
from service.jobs.records import EventType
from service.jobs.states import JobState, ShardState
from tests.integration.api.test_problems import check_problem
from tests.support.api import RECIPE, LiveApi
from tests.support.jobs import ERROR, new_job, receipt_for, tiny_plan

_outputs = itertools.count()


def body(**fields: Any) -> dict[str, Any]:
    return {"recipe": RECIPE, "output_uri": f"mem://jobs/{next(_outputs)}", **fields}


def submit(api: LiveApi, sent: dict[str, Any], key: str | None = None) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return api.admin.post("/v1/jobs", json=sent, headers=headers)


def test_a_submitted_job_is_queued_and_shown_in_full(api: LiveApi) -> None:
    sent = body(
        type="merge",
        options={"seed": 7, "max_shard_size": "1MB"},
        labels={"team": "vision"},
        metadata={"note": "line one\nline two"},
        priority=5,
        deadline_seconds=3600,
    )
    response = submit(api, sent)
    job = response.json()
    assert response.status_code == 201
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert response.headers["etag"] == job["etag"]
    assert job["object"] == "job"
    assert job["url"] == f"/jobs/{job['id']}"
    assert (job["state"], job["is_terminal"], job["attempt"]) == ("queued", False, 1)
    assert job["created_at"].endswith("Z")
    assert job["recipe_source"] == RECIPE
    assert job["method"] == "linear"
    assert job["options"]["max_shard_size"] == 10**6
    assert (job["seed"], job["priority"], job["deadline_seconds"]) == (7, 5, 3600)
    assert (job["labels"], job["metadata"]) == (sent["labels"], sent["metadata"])
    assert [item["uri"] for item in job["inputs"]] == ["mem://models/a", "mem://models/b"]
    assert job["output"] is None
    assert api.admin.get(response.headers["location"]).json() == job


@pytest.mark.parametrize("write", [json.dumps, yaml.safe_dump], ids=["json", "yaml"])
def test_a_recipe_may_be_sent_as_text(api: LiveApi, write: Any) -> None:
    text = write(RECIPE)
    job = submit(api, body(recipe=text)).json()
    assert job["recipe_source"] == text
    assert job["recipe_digest"] == submit(api, body()).json()["recipe_digest"]


def test_submitting_writes_nothing_to_storage(api: LiveApi) -> None:
    sent = body()
    submit(api, sent)
    assert api.storage.list(sent["output_uri"]) == []


def test_an_output_that_exists_is_refused_unless_it_may_be_replaced(api: LiveApi) -> None:
    sent = body()
    api.storage.write_bytes(f"{sent['output_uri']}/model.safetensors.index.json", b"{}")
    check_problem(submit(api, sent), "output_exists")
    assert submit(api, {**sent, "options": {"overwrite": True}}).status_code == 201


# -- idempotency


@pytest.mark.parametrize("repeat", ["key-1", '"key-1"'], ids=["bare", "quoted"])
def test_a_repeated_key_gives_the_first_job_as_it_is_now(api: LiveApi, repeat: str) -> None:
    sent = body()
    key = f"{sent['output_uri']}-key"
    first = submit(api, sent, key).json()
    api.admin.post(f"/v1/jobs/{first['id']}/cancel")
    again = submit(api, sent, repeat.replace("key-1", key))
    assert again.status_code == 200
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["location"] == f"/v1/jobs/{first['id']}"
    assert again.json()["id"] == first["id"]
    assert again.json()["state"] == "cancelled"


def test_a_repeat_is_no_fault_once_the_job_has_filled_its_output(api: LiveApi) -> None:
    sent = body()
    first = submit(api, sent, "fills-output").json()
    api.storage.write_bytes(f"{sent['output_uri']}/model.safetensors.index.json", b"{}")
    assert submit(api, sent, "fills-output").json()["id"] == first["id"]


def test_defaults_written_out_are_the_same_request(api: LiveApi) -> None:
    sent = body()
    first = submit(api, sent, "defaults").json()
    again = submit(api, {**sent, "type": "merge", "priority": 0, "labels": {}}, "defaults")
    assert again.json()["id"] == first["id"]


def test_a_key_with_another_body_is_refused(api: LiveApi) -> None:
    submit(api, body(), "reused")
    check_problem(submit(api, body(), "reused"), "idempotency_key_reused")


def test_a_key_belongs_to_its_token(api: LiveApi) -> None:
    sent = body()
    first = submit(api, sent, "shared").json()
    other = api.with_scopes("jobs:write").post(
        "/v1/jobs", json=sent, headers={"Idempotency-Key": "shared"}
    )
    assert other.status_code == 201
    assert other.json()["id"] != first["id"]


def test_a_refused_request_does_not_use_up_its_key(api: LiveApi) -> None:
    check_problem(submit(api, body(recipe="merge_method: linear"), "later"), "invalid_recipe")
    assert submit(api, body(), "later").status_code == 201


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, '""'])
def test_a_key_is_visible_ascii(api: LiveApi, key: str) -> None:
    if key == '""':
        assert submit(api, body(), key).status_code == 201  # two characters, no pair of quotes
    else:
        check_problem(submit(api, body(), key), "malformed_request")


def test_equal_requests_at_once_make_one_job(api: LiveApi) -> None:
    sent = body()
    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(lambda _: submit(api, sent, "at-once"), range(50)))
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sorted({answer.status_code for answer in answers}) == [200, 201]
    assert sum(answer.status_code == 201 for answer in answers) == 1


# -- lists


def pages(api: LiveApi, url: str) -> list[list[str]]:
    """Ids, page by page."""
    found = []
    next_url: str | None = url
    while next_url:
        response = api.admin.get(next_url)
        page = response.json()
        assert page["object"] == "list"
        assert (page["next_url"] is None) == (page["next_cursor"] is None)
        assert ("next" in response.links) == bool(page["next_url"])
        found.append([job["id"] for job in page["data"]])
        next_url = page["next_url"]
    return found


def test_pages_hold_every_job_once_newest_first_while_others_come(api: LiveApi) -> None:
    made = [api.store.submit(new_job(labels={"list": "a"}))[0].id for _ in range(7)]
    url = "/v1/jobs?limit=3&label.list=a"
    seen = []
    while url:
        page = api.admin.get(url).json()
        seen += [job["id"] for job in page["data"]]
        api.store.submit(new_job(labels={"list": "a"}))
        url = page["next_url"]
    assert seen == made[::-1]


def test_a_page_that_is_just_full_is_the_last(api: LiveApi) -> None:
    made = [api.store.submit(new_job(labels={"list": "b"}))[0].id for _ in range(4)]
    assert pages(api, "/v1/jobs?limit=2&label.list=b") == [made[:1:-1], made[1::-1]]


def test_filters_are_combined_and_kept_by_the_cursor(api: LiveApi) -> None:
    labels = {"list": "c", "kind": "x/y"}
    cancelled = api.bring_to(JobState.CANCELLED, labels=labels)[0].id
    queued = [api.store.submit(new_job(labels=labels))[0].id for _ in range(3)]
    api.store.submit(new_job(labels={"list": "c"}))
    url = "/v1/jobs?label.list=c&label.kind=x/y"
    assert pages(api, f"{url}&state=queued&limit=1") == [[job] for job in queued[::-1]]
    assert pages(api, f"{url}&state=cancelled&state=queued") == [[*queued[::-1], cancelled]]
    assert pages(api, f"{url}&created_after=2999-01-01T00:00:00Z") == [[]]
    assert pages(api, f"{url}&method=wudi") == [[]]


def test_a_cursor_cannot_be_continued_with_other_filters(api: LiveApi) -> None:
    for _ in range(2):
        api.store.submit(new_job(labels={"list": "d"}))
    cursor = api.admin.get("/v1/jobs?limit=1&label.list=d").json()["next_cursor"]
    same = api.admin.get("/v1/jobs", params={"cursor": cursor, "label.list": "d"})
    assert len(same.json()["data"]) == 1
    other = api.admin.get("/v1/jobs", params={"cursor": cursor, "label.list": "e"})
    check_problem(other, "bad_cursor")


def test_lists_hold_no_recipes(api: LiveApi) -> None:
    api.submit("list-without-recipes")
    (job, *_) = api.admin.get("/v1/jobs?limit=1").json()["data"]
    assert "recipe_digest" in job
    assert not {"recipe", "recipe_source", "options"} & set(job)


def test_counts_name_every_state(api: LiveApi) -> None:
    counts = api.admin.get("/v1/jobs/counts").json()["counts"]
    assert set(counts) == set(JobState)
    api.submit("counted")
    assert api.admin.get("/v1/jobs/counts").json()["counts"]["queued"] == counts["queued"] + 1


# -- changes


def test_cancelling_a_queued_job_is_done_at_once_and_may_be_repeated(api: LiveApi) -> None:
    job = api.submit("cancel-queued")
    path = f"/v1/jobs/{job['id']}/cancel"
    first, second = api.admin.post(path), api.admin.post(path, json={"mode": "orderly"})
    assert (first.status_code, second.status_code) == (202, 200)
    assert first.json()["state"] == second.json()["state"] == "cancelled"


def test_cancelling_a_running_job_can_be_made_urgent(api: LiveApi) -> None:
    job, _ = api.bring_to(JobState.RUNNING)
    path = f"/v1/jobs/{job.id}/cancel"
    answers = [api.admin.post(path, json={"mode": mode}) for mode in ("orderly", "now", "now")]
    assert [answer.status_code for answer in answers] == [202, 202, 200]
    assert [answer.json()["cancel_requested"] for answer in answers] == ["orderly", "now", "now"]
    assert answers[0].json()["state"] == "cancelling"


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED])
def test_a_job_that_has_ended_cannot_be_cancelled(api: LiveApi, state: JobState) -> None:
    job, _ = api.bring_to(state)
    check_problem(api.admin.post(f"/v1/jobs/{job.id}/cancel"), "already_terminal")


def test_an_unknown_mode_of_cancelling_is_refused(api: LiveApi) -> None:
    job = api.submit("cancel-mode")
    response = api.admin.post(f"/v1/jobs/{job['id']}/cancel", json={"mode": "gently"})
    check_problem(response, "invalid_request")


def test_a_failed_job_can_be_retried_and_no_other(api: LiveApi) -> None:
    job, _ = api.bring_to(JobState.FAILED)
    retried = api.admin.post(f"/v1/jobs/{job.id}/retry")
    assert retried.status_code == 202
    assert (retried.json()["state"], retried.json()["attempt"]) == ("queued", 2)
    check_problem(api.admin.post(f"/v1/jobs/{job.id}/retry"), "conflict")


def test_resubmitting_makes_a_new_job_of_the_same_recipe(api: LiveApi) -> None:
    old = api.submit("resubmitted", labels={"a": "b"}, options={"seed": 3})
    path = f"/v1/jobs/{old['id']}/resubmit"
    headers = {"Idempotency-Key": "resubmit-1"}
    sent = {"output_uri": "mem://jobs/resubmitted"}
    new = api.admin.post(path, json=sent, headers=headers)
    assert new.status_code == 201
    assert new.json()["resubmitted_from"] == old["id"]
    assert new.json()["id"] != old["id"]
    assert new.json()["output_uri"] == sent["output_uri"]
    for field in ("recipe_source", "recipe_digest", "labels", "options", "seed"):
        assert new.json()[field] == old[field]
    again = api.admin.post(path, json=sent, headers=headers)
    assert (again.status_code, again.json()["id"]) == (200, new.json()["id"])


def test_labels_are_replaced_if_nobody_changed_them_meanwhile(api: LiveApi) -> None:
    job = api.submit("labels", labels={"a": "1"})
    path = f"/v1/jobs/{job['id']}"
    headers = {"If-Match": job["etag"]}
    changed = api.admin.patch(path, json={"labels": {"b": "2"}, "priority": 9}, headers=headers)
    assert changed.status_code == 200
    assert (changed.json()["labels"], changed.json()["priority"]) == ({"b": "2"}, 9)
    assert changed.headers["etag"] == changed.json()["etag"] != job["etag"]
    check_problem(api.admin.patch(path, json={"labels": {}}, headers=headers), "etag_mismatch")
    check_problem(api.admin.patch(path, json={}, headers={"If-Match": "x"}), "etag_mismatch")
    assert api.admin.patch(path, json={}, headers={"If-Match": "*"}).json()["labels"] == {"b": "2"}


def test_the_priority_of_a_claimed_job_is_fixed(api: LiveApi) -> None:
    job, _ = api.bring_to(JobState.RUNNING)
    check_problem(api.admin.patch(f"/v1/jobs/{job.id}", json={"priority": 1}), "conflict")


def test_a_job_that_has_ended_can_be_forgotten(api: LiveApi) -> None:
    job = api.submit("forgotten")
    path = f"/v1/jobs/{job['id']}"
    check_problem(api.admin.delete(path), "conflict")
    api.admin.post(f"{path}/cancel")
    deleted = api.admin.delete(path)
    assert (deleted.status_code, deleted.content) == (204, b"")
    check_problem(api.admin.get(path), "not_found")


def test_removing_an_output_needs_a_scope_of_its_own(api: LiveApi) -> None:
    job, _ = api.bring_to(JobState.SUCCEEDED)
    path = f"/v1/jobs/{job.id}?output="
    refused = api.with_scopes(Scope.JOBS_WRITE).delete(f"{path}delete")
    assert Scope.OUTPUT_DELETE in check_problem(refused, "forbidden")["detail"]
    check_problem(api.with_scopes(Scope.OUTPUT_DELETE).delete(f"{path}delete"), "forbidden")
    check_problem(api.admin.delete(f"{path}all"), "invalid_request")
    assert api.with_scopes(Scope.JOBS_WRITE).delete(f"{path}keep").status_code == 204


def test_a_job_that_published_nothing_is_forgotten_with_its_output(api: LiveApi) -> None:
    both = api.with_scopes(Scope.JOBS_WRITE, Scope.OUTPUT_DELETE)
    running, _ = api.bring_to(JobState.RUNNING)
    check_problem(both.delete(f"/v1/jobs/{running.id}?output=delete"), "conflict")
    cancelled, _ = api.bring_to(JobState.CANCELLED)
    assert both.delete(f"/v1/jobs/{cancelled.id}?output=delete").status_code == 204


# -- outcomes


def test_a_job_shows_its_shards_result_and_report(api: LiveApi) -> None:
    job, claim = api.bring_to(JobState.PLANNING)
    assert claim is not None
    path = f"/v1/jobs/{job.id}"
    waiting = api.admin.get(f"{path}/result")
    assert (waiting.status_code, waiting.json()["output"]) == (202, None)
    assert waiting.headers["retry-after"]
    check_problem(api.admin.get(f"{path}/report"), "not_found")
    assert api.admin.get(f"{path}/shards").json()["data"] == []

    plan = tiny_plan(job.output_uri, shards=2)
    api.store.save_plan(claim, plan)
    api.store.transition(claim, JobState.RUNNING)
    receipt = receipt_for(plan, 0)
    api.store.record_shard(
        claim, 0, ShardState.SUCCEEDED, attempt=1, receipt={"sha256": receipt.sha256}
    )
    first, second = api.admin.get(f"{path}/shards").json()["data"]
    assert (first["object"], first["index"], first["state"]) == ("shard", 0, "succeeded")
    assert first["file_name"] == plan.shards[0].file_name
    assert first["receipt"]["sha256"] == receipt.sha256
    assert (second["state"], second["receipt"]) == ("pending", None)

    api.store.transition(claim, JobState.PUBLISHING)
    output = {"uri": job.output_uri, "digest": "sha256:x"}
    api.store.transition(claim, JobState.SUCCEEDED, output=output, report={"tensors": [1, 2]})
    result = api.admin.get(f"{path}/result")
    assert result.status_code == 200
    assert result.json() == {
        "object": "job_result",
        "job_id": job.id,
        "state": "succeeded",
        "output": output,
    }
    assert api.admin.get(f"{path}/report").json() == {"tensors": [1, 2]}


def test_the_result_of_a_job_without_one_is_a_conflict(api: LiveApi) -> None:
    failed, _ = api.bring_to(JobState.FAILED)
    problem = check_problem(api.admin.get(f"/v1/jobs/{failed.id}/result"), "job_failed")
    assert ERROR["detail"] in problem["detail"]
    assert api.admin.get(f"/v1/jobs/{failed.id}").json()["error"] == ERROR
    cancelled, _ = api.bring_to(JobState.CANCELLED)
    check_problem(api.admin.get(f"/v1/jobs/{cancelled.id}/result"), "job_cancelled")


def test_events_of_a_job_come_in_pages(api: LiveApi) -> None:
    job, claim = api.bring_to(JobState.RUNNING)
    assert claim is not None
    for number in range(5):
        api.store.append_event(claim, EventType.JOB_WARNING, {"number": number})
    total = api.store.get(job.id).event_seq
    found, url = [], f"/v1/jobs/{job.id}/events?limit=2"
    while url:
        page = api.admin.get(url).json()
        found += page["data"]
        url = page["next_url"]
    assert [event["seq"] for event in found] == list(range(1, total + 1))
    rest = api.admin.get(f"/v1/jobs/{job.id}/events?after={total - 1}").json()["data"]
    assert rest == found[-1:]
    assert api.admin.get(f"/v1/jobs/{job.id}/events?after={total}").json()["data"] == []
