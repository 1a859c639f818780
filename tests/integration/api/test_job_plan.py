"""The plan of a job: figures, and where every tensor stands."""

from __future__ import annotations

from service.jobs.states import JobState
from tests.support.api import LiveApi
from tests.support.jobs import tiny_plan
from tests.support.staged import in_two_stages


def test_the_plan_of_a_job_lists_every_tensor_in_file_order(api: LiveApi) -> None:
    job, claim = api.bring_to(JobState.PLANNING)
    assert claim is not None
    plan = tiny_plan(job.output_uri)
    api.store.save_plan(claim, plan)
    body = api.admin.get(f"/v1/jobs/{job.id}/plan").json()
    assert (body["object"], body["job_id"], body["plan_digest"]) == (
        "job_plan",
        job.id,
        plan.digest,
    )
    assert [tensor["name"] for tensor in body["layout"]] == [
        problem.tensor_name for shard in plan.shards for problem in shard.problems
    ]
    assert body["layout"][0] == {
        "name": "layer.0.0",
        "shard": 0,
        "kind": "weights",
        "role": "other",
        "layer": -1,
        "shape": [2],
        "dtype": "BF16",
        "method": "linear",
        "bytes_read": 8,
        "flops": 0.0,
    }
    assert len(body["files"]) == body["shards"] == len(plan.shards)


def test_intermediate_work_is_listed_with_the_tensor_that_it_is_for(api: LiveApi) -> None:
    job, claim = api.bring_to(JobState.PLANNING)
    assert claim is not None
    plan = in_two_stages(tiny_plan(job.output_uri))
    api.store.save_plan(claim, plan)
    layout = api.admin.get(f"/v1/jobs/{job.id}/plan").json()["layout"]
    names = [tensor["name"] for tensor in layout]
    assert names == 2 * names[: plan.totals.tensors]
    assert {
        (tensor["shard"] in [s.index for s in plan.outputs], tensor["kind"]) for tensor in layout
    } == {
        (False, "intermediate"),
        (True, "weights"),
    }


def test_a_job_that_is_not_planned_has_no_plan_yet(api: LiveApi) -> None:
    job, _ = api.bring_to(JobState.QUEUED)
    response = api.admin.get(f"/v1/jobs/{job.id}/plan")
    assert response.status_code == 404
    assert response.json()["code"] == "not_found"
    assert "is queued" in response.json()["detail"]
