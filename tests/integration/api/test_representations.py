"""What clients may send and what they may ask for."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.api.test_problems import check_problem
from tests.support.api import LiveApi

YAML = """
recipe:
  merge_method: linear
  models:   # two of them
    - model: mem://models/a
    - model: mem://models/b
  parameters: {weight: 0.5}
output_uri: mem://out/%s
labels: {team: "1"}
"""


def send(api: LiveApi, path: str, body: str | bytes, kind: str = "application/yaml") -> Any:
    return api.admin.post(path, content=body, headers={"Content-Type": kind})


@pytest.mark.parametrize("kind", ["application/yaml", "application/x-yaml", "text/yaml; x=1"])
def test_a_body_may_be_yaml(api: LiveApi, kind: str) -> None:
    name = kind.translate(str.maketrans("/; =", "----"))
    job = send(api, "/v1/jobs", YAML % name, kind)
    assert job.status_code == 201, job.text
    assert job.json()["labels"] == {"team": "1"}
    assert job.json()["recipe_source"]["models"] == [
        {"model": "mem://models/a"},
        {"model": "mem://models/b"},
    ]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("recipe: [", "line"),
        ("recipe: !!python/object/apply:os.system [id]", "tag"),
        ("a: &a [x]\nb: [*a,*a]\n---\nc: 1", "documents"),
        ("- 1", "mapping"),
        (" ", "empty"),
        (b"\xff\xfe\x00", "UTF-8"),
        ("a: " + "[" * 60 + "]" * 60, "deeper"),
        ("a: &a [x]\n" + "".join(f"k{i}: *a\n" for i in range(101)), "aliases"),
        ("when: 2024-01-01", "quotes"),
        ("a: " + "9" * 5000, "number"),
        ("a: 1\na: 2", "twice"),
        ("a: .nan", "finite"),
    ],
)
def test_yaml_that_is_a_trap_is_refused_with_a_sentence(
    api: LiveApi, body: str | bytes, said: str
) -> None:
    problem = check_problem(send(api, "/v1/recipes/validate", body), "malformed_request")
    assert said in problem["detail"]


def test_a_yaml_body_has_the_same_limit_and_the_same_fields(api: LiveApi) -> None:
    check_problem(send(api, "/v1/plans", b"a" * (1 << 21)), "body_too_large")
    problem = check_problem(
        send(api, "/v1/plans", "recipee: x\nrecipe: y\noutput_uri: z"), "unknown_field"
    )
    assert "'recipe'" in problem["detail"]


@pytest.mark.parametrize(
    "accept", ["application/json", "application/*", "*/*", "text/html, */*;q=0.1", ""]
)
def test_json_is_given_to_whoever_can_read_it(api: LiveApi, accept: str) -> None:
    assert api.admin.get("/v1/jobs", headers={"Accept": accept}).status_code == 200


@pytest.mark.parametrize(
    ("path", "accept"),
    [("/v1/jobs", "application/xml"), ("/v1/jobs", "text/event-stream"), ("/metrics", "image/png")],
)
def test_what_an_address_does_not_give_is_not_acceptable(
    api: LiveApi, path: str, accept: str
) -> None:
    problem = check_problem(api.admin.get(path, headers={"Accept": accept}), "not_acceptable")
    assert accept in problem["detail"]


@pytest.mark.parametrize("name", ['te"am', "te\\am", "", "\x00", "x" * 64, "team'", "a b"])
def test_a_filter_by_what_cannot_be_a_label_is_refused(api: LiveApi, name: str) -> None:
    answer = api.admin.get("/v1/jobs", params={f"label.{name}": "x"})
    problem = check_problem(answer, "invalid_request")
    assert "label" in problem["detail"]


@pytest.mark.parametrize("name", ['te"am', "te\\am", "", "\x00", "x" * 64])
def test_what_cannot_be_a_label_is_refused(api: LiveApi, name: str) -> None:
    body = {"recipe": "x", "output_uri": "mem://out/x", "labels": {name: "x"}}
    check_problem(api.admin.post("/v1/jobs", json=body), "invalid_request")
