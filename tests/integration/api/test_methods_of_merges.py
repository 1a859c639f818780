"""Merges by several methods: of documents that need each other, or of a sweep's variants."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.support.api import LiveApi

_names = itertools.count()

DOCUMENTS: dict[str, Any] = {
    "documents": [
        {
            "merge_method": "slerp",
            "base_model": "first",
            "models": [{"model": "first"}, {"model": "mem://models/b"}],
            "parameters": {"t": 0.5},
        },
        {
            "name": "first",
            "merge_method": "task_arithmetic",
            "base_model": "mem://models/a",
            "models": [{"model": "mem://models/b"}],
        },
    ]
}
SWEEP: dict[str, Any] = {
    "merge_method": "task_arithmetic",
    "base_model": "mem://models/a",
    "models": [{"model": "mem://models/b"}],
    "sweep": [{"name": "sum"}, {"name": "trimmed", "merge_method": "ties"}],
}


def body(recipe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"recipe": recipe, "output_uri": f"mem://several/{next(_names)}", **changes}


@pytest.mark.parametrize(
    ("recipe", "method", "methods"),
    [
        (DOCUMENTS, "slerp", ["task_arithmetic", "slerp"]),
        (SWEEP, "task_arithmetic", ["task_arithmetic", "ties"]),
    ],
)
def test_all_methods_of_a_merge_are_told(
    api: LiveApi, recipe: dict[str, Any], method: str, methods: list[str]
) -> None:
    label = {"of": f"methods-{next(_names)}"}
    checked = api.admin.post("/v1/recipes/validate", json={"recipe": recipe}).json()
    planned = api.admin.post("/v1/plans", json=body(recipe)).json()
    job = api.admin.post("/v1/jobs", json=body(recipe, labels=label)).json()
    for told in (checked, planned, job):
        assert (told["method"], told["methods"]) == (method, methods)

    [created] = api.admin.get(f"/v1/jobs/{job['id']}/events").json()["data"]
    assert created["data"]["methods"] == methods
    log = api.admin.get(f"/v1/jobs/{job['id']}/logs").text
    assert f"submitted: {', '.join(methods)}" in log

    def found(path: str, by: str) -> list[str]:
        query = f"{path}?label.of={label['of']}&method={by}"
        items = api.admin.get(query).json()["data"]
        return [item.get("job_id") or item["id"] for item in items]

    for by in methods:
        assert found("/v1/jobs", by) == found("/v1/events", by) == [job["id"]]
    assert found("/v1/jobs", "tie") == found("/v1/events", "tie") == []
    [by_text] = api.admin.get(f"/v1/jobs?q={methods[0]} {methods[1]} {label['of']}").json()["data"]
    assert by_text["id"] == job["id"]


def test_a_plan_lists_its_documents_in_the_order_of_their_steps(api: LiveApi) -> None:
    planned = api.admin.post("/v1/plans", json=body(DOCUMENTS)).json()
    assert planned["documents"] == [
        {"name": "first", "method": "task_arithmetic"},
        {"name": None, "method": "slerp"},
    ]
    assert api.admin.post("/v1/plans", json=body(SWEEP)).json()["documents"] == []
