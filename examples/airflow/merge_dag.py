"""Merging in an Airflow DAG, over plain HTTP: no operator of ours is needed.

The connection ``mergeyard`` holds the service's address (as its host) and the token (as its
password). Waiting takes no worker: the sensor looks at the status code of the job's result, and
gives its place up in between.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request

from airflow.sdk import Connection, PokeReturnValue, dag, get_current_context, task


def call(path: str, body: dict | None = None, key: str = "") -> tuple[int, dict]:
    """A request to the service; status and body of its answer."""
    service = Connection.get("mergeyard")
    headers = {
        "Authorization": f"Bearer {service.password}",
        "Content-Type": "application/json",
        "Idempotency-Key": key,
    }
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(service.host.rstrip("/") + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@dag(schedule=None, catchup=False, params={"recipe": "", "output_uri": ""}, tags=["models"])
def merge_models() -> None:
    """Put training before it and evaluation after it."""

    @task
    def submit() -> str:
        """Submit the merge; gives the job's id.

        A task that is run again finds its own job; if that has failed, it goes on from what is
        already there.
        """
        context = get_current_context()
        body = {name: context["params"][name] for name in ("recipe", "output_uri")}
        status, job = call("/v1/jobs", body, key=f"{context['run_id']}-{context['ti'].task_id}")
        if status not in (200, 201):
            raise RuntimeError(job["detail"])
        if job["state"] == "failed":
            call(f"/v1/jobs/{job['id']}/retry", {})
        return job["id"]

    @task.sensor(poke_interval=30, timeout=24 * 3600, mode="reschedule")
    def wait_for_merge(job_id: str) -> PokeReturnValue:
        """Until the job has ended; gives the output's address."""
        status, result = call(f"/v1/jobs/{job_id}/result")
        if status == 200:
            return PokeReturnValue(is_done=True, xcom_value=result["output"]["uri"])
        if status not in (202, 429, 503):
            raise RuntimeError(result["detail"])
        return PokeReturnValue(is_done=False)

    wait_for_merge(submit())


merge_models()
