"""Plans that are kept, looked at again, and run exactly or not at all."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import pytest

from merging.errors import MergeError
from service.jobs.sql_plans import PLAN_HOURS
from service.runner.steps import load_or_make_plan
from tests.integration.api.test_problems import check_problem
from tests.support.api import RECIPE, LiveApi
from tests.support.header_checkpoints import llama_tensors, put_checkpoint

_names = itertools.count()
NO_PLAN = f"plan_{'0' * 26}"


def plan(api: LiveApi, **fields: Any) -> dict[str, Any]:
    body = {"recipe": RECIPE, "output_uri": f"mem://plans/{next(_names)}", **fields}
    answer = api.admin.post("/v1/plans", json=body)
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/v1/plans/{answer.json()['id']}"
    return answer.json()


def run(api: LiveApi, **fields: Any) -> httpx.Response:
    return api.admin.post("/v1/jobs", json=fields)


def plan_with_own_input(api: LiveApi) -> tuple[dict[str, Any], str]:
    """A plan, and an input of it that no other test reads."""
    uri = f"mem://models/own-{next(_names)}"
    put_checkpoint(api.storage, uri, llama_tensors(hidden=64, layers=1))
    recipe = {**RECIPE, "models": [{"model": "mem://models/a"}, {"model": uri}]}
    return plan(api, recipe=recipe), uri


def change(api: LiveApi, uri: str) -> None:
    put_checkpoint(api.storage, uri, llama_tensors(hidden=64, layers=1))


def test_an_option_that_the_merge_has_no_use_for_is_told_by_its_place(api: LiveApi) -> None:
    options = {"statistics_uri": "mem://kept"}
    body = {"recipe": RECIPE, "output_uri": f"mem://plans/{next(_names)}", "options": options}
    for path in ("/v1/plans", "/v1/jobs"):
        problem = check_problem(api.admin.post(path, json=body), "incompatible_options")
        assert [error["pointer"] for error in problem["errors"]] == ["/options/statistics_uri"]


def test_a_plan_can_be_read_again(api: LiveApi) -> None:
    made = plan(api, options={"max_shard_size": "30kB"})
    assert made["id"].startswith("plan_")
    assert made["shards"] > 1
    assert api.admin.get(f"/v1/plans/{made['id']}").json() == made


@pytest.mark.parametrize("plan_id", [NO_PLAN, "plan_1", "x", "%00"])
def test_there_is_no_such_plan(api: LiveApi, plan_id: str) -> None:
    check_problem(api.admin.get(f"/v1/plans/{plan_id}"), "not_found")


def test_a_job_runs_the_plan_that_it_names(api: LiveApi) -> None:
    made = plan(api, options={"max_shard_size": "30kB", "seed": 7})
    answer = run(api, plan_id=made["id"], labels={"team": "x"})
    assert answer.status_code == 201, answer.text
    job = answer.json()
    assert job["plan_id"] == made["id"]
    assert (job["recipe_source"], job["seed"], job["labels"]) == (RECIPE, 7, {"team": "x"})
    planned = load_or_make_plan(api.store, api.store.get(job["id"]), api.storage)
    assert planned.digest == made["plan_digest"]


def test_a_plan_is_refused_once_an_input_has_changed(api: LiveApi) -> None:
    made, uri = plan_with_own_input(api)
    change(api, uri)
    problem = check_problem(run(api, plan_id=made["id"]), "plan_outdated")
    assert uri in problem["detail"]
    assert "mem://models/a" not in problem["detail"]


def test_a_job_of_a_plan_fails_rather_than_run_another_one(api: LiveApi) -> None:
    made, uri = plan_with_own_input(api)
    job = api.store.get(run(api, plan_id=made["id"]).json()["id"])
    change(api, uri)
    with pytest.raises(MergeError) as caught:
        load_or_make_plan(api.store, job, api.storage)
    assert caught.value.code == "plan_outdated"
    assert uri in caught.value.detail


def test_a_plan_that_is_not_kept_any_more_cannot_be_run(api: LiveApi) -> None:
    problem = check_problem(run(api, plan_id=NO_PLAN), "plan_outdated")
    assert f"{PLAN_HOURS} hours" in problem["detail"]


@pytest.mark.parametrize(
    ("body", "pointers"),
    [
        ({}, ["/recipe", "/output_uri"]),
        ({"recipe": RECIPE}, ["/output_uri"]),
        ({"output_uri": "mem://plans/x"}, ["/recipe"]),
        ({"plan_id": NO_PLAN, "recipe": RECIPE}, ["/recipe"]),
        (
            {"plan_id": NO_PLAN, "options": {}, "output_uri": "mem://x/y"},
            ["/options", "/output_uri"],
        ),
        ({"plan_id": "plan"}, ["/plan_id"]),
    ],
)
def test_a_job_is_a_recipe_with_an_output_or_a_plan(
    api: LiveApi, body: dict[str, Any], pointers: list[str]
) -> None:
    problem = check_problem(run(api, **body), "invalid_request")
    assert [error["pointer"] for error in problem["errors"]] == pointers


def test_a_repeated_submission_of_a_plan_gives_the_first_job(api: LiveApi) -> None:
    made, uri = plan_with_own_input(api)
    headers = {"Idempotency-Key": "the-plan"}
    first = api.admin.post("/v1/jobs", json={"plan_id": made["id"]}, headers=headers)
    change(api, uri)
    again = api.admin.post("/v1/jobs", json={"plan_id": made["id"]}, headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json()["id"] == first.json()["id"]


def test_a_sweep_is_planned_checked_and_submitted_like_any_recipe(api: LiveApi) -> None:
    variants = [
        {"name": name, "parameters": {"weight": weight}} for name, weight in (("a", 0.3), ("b", 1))
    ]
    shared = {key: value for key, value in RECIPE.items() if key != "parameters"}
    made = plan(api, recipe={**shared, "sweep": variants})
    assert [v["name"] for v in made["variants"]] == ["a", "b"]
    assert {v["uri"] for v in made["variants"]} == {f"{made['output_uri']}/{n}" for n in "ab"}
    assert len({v["recipe_digest"] for v in made["variants"]}) == 2
    alone = plan(api)
    assert made["bytes_read"] == alone["bytes_read"]
    assert made["bytes_written"] == 2 * alone["bytes_written"]
    assert alone["variants"] == []
    job = run(api, plan_id=made["id"]).json()
    assert job["recipe"]["sweep"] == variants
    bad = {**shared, "sweep": [variants[0], {**variants[1], "name": "a/b"}]}
    checked = api.admin.post("/v1/recipes/validate", json={"recipe": bad}).json()
    assert [error["pointer"] for error in checked["errors"]] == ["/sweep/1/name"]
    refused = run(api, recipe=bad, output_uri="mem://plans/never")
    assert refused.status_code == 422
    assert [error["pointer"] for error in refused.json()["errors"]] == ["/sweep/1/name"]
