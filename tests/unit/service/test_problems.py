from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from merging.errors import CheckpointError, Fault, MergeError, RecipeError, StorageError
from service.problems import KINDS, problem, problem_from_error, problem_response

REPOSITORY = Path(__file__).parents[3]


def test_an_error_becomes_a_problem_with_everything_that_it_knows() -> None:
    error = RecipeError(
        "Two things are wrong.",
        faults=[Fault("/models/0", "bad_parameter", "Too large."), Fault("", "x", "y")],
        context={"tensor_name": "lm_head.weight"},
    )
    assert problem_from_error(error, instance="/v1/jobs", request_id="req_1") == {
        "type": "urn:mergeyard:problem:invalid_recipe",
        "title": "The recipe cannot be run",
        "status": 422,
        "detail": "Two things are wrong.",
        "code": "invalid_recipe",
        "retryable": False,
        "errors": [
            {"pointer": "/models/0", "code": "bad_parameter", "detail": "Too large."},
            {"pointer": "", "code": "x", "detail": "y"},
        ],
        "instance": "/v1/jobs",
        "request_id": "req_1",
        "context": {"tensor_name": "lm_head.weight"},
    }


def test_a_problem_of_a_job_has_no_request() -> None:
    body = problem_from_error(CheckpointError("x", code="missing_tensor"))
    assert not {"instance", "request_id", "context"} & set(body)


def test_a_missing_file_is_not_a_missing_address() -> None:
    missing_file = problem_from_error(StorageError("x", code="not_found"))
    missing_job = problem_from_error(MergeError("x", code="not_found"))
    assert (missing_file["code"], missing_file["status"]) == ("storage_not_found", 422)
    assert (missing_job["code"], missing_job["status"]) == ("not_found", 404)


def test_an_unknown_code_is_kept_and_is_our_fault() -> None:
    body = problem_from_error(MergeError("x", code="quite_new"))
    assert (body["code"], body["status"]) == ("quite_new", 500)


def test_answers_carry_the_headers_of_their_status() -> None:
    waiting = problem_response(problem("throttled", "x", retryable=True))
    assert waiting.headers["retry-after"] == "5"
    assert waiting.headers["content-type"] == "application/problem+json"
    stranger = problem_response(problem("unauthenticated", "x"), {"Allow": "GET"})
    assert stranger.headers["www-authenticate"] == 'Bearer realm="mergeyard"'
    assert stranger.headers["allow"] == "GET"


def test_what_is_not_unicode_can_be_quoted() -> None:
    body = problem_response(problem("invalid_request", "\ud800")).body
    assert json.loads(body)["detail"] == "\ud800"


def documented_codes() -> set[str]:
    """Codes that the classes of errors list in their docstrings, and those given in the code."""
    codes: set[str] = set()
    for path in ("merging/errors.py", "service/jobs/errors.py"):
        text = (REPOSITORY / path).read_text()
        for passage in re.findall(r"Codes: (.*?)\"\"\"", text, re.DOTALL):
            codes |= set(re.findall(r"``([a-z_]+)``", passage))
    for room in ("merging", "workers", "service"):
        for file in (REPOSITORY / room).rglob("*.py"):
            codes |= set(re.findall(r"\b(?:default_)?code=?\s?=\s?\"([a-z_]+)\"", file.read_text()))
    return codes


def test_every_code_has_a_status_and_a_title() -> None:
    codes = documented_codes()
    assert len(codes) > 30
    assert codes <= set(KINDS), codes - set(KINDS)


@pytest.mark.parametrize("code", sorted(KINDS))
def test_titles_are_sentences_and_statuses_are_errors(code: str) -> None:
    status, title = KINDS[code]
    assert 400 <= status < 600
    assert title[0].isupper()
    assert not title.endswith(".")
