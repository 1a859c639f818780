"""Merging as a step of a Kubeflow pipeline, over plain HTTP.

    python merge_component.py      # writes merge_pipeline.yaml, to be uploaded

The step's container needs nothing but Python, and the token in MERGEYARD_TOKEN; give it from a
secret of the cluster: ``kubernetes.use_secret_as_env`` of the package kfp-kubernetes.
"""

from kfp import compiler, dsl


@dsl.component(base_image="python:3.11-slim")
def merge(service_url: str, recipe: str, output_uri: str, run_id: str) -> str:
    """Merge, and wait for the end; gives the output's address.

    A step that is run again finds its own job, since the run's id is the Idempotency-Key; if that
    has failed, it goes on from what is already there.
    """
    import json
    import os
    import time
    import urllib.error
    import urllib.request

    def call(path: str, body: dict | None = None) -> tuple[int, dict]:
        headers = {
            "Authorization": f"Bearer {os.environ['MERGEYARD_TOKEN']}",
            "Content-Type": "application/json",
            "Idempotency-Key": run_id,
        }
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(service_url.rstrip("/") + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    status, job = call("/v1/jobs", {"recipe": recipe, "output_uri": output_uri})
    if status not in (200, 201):
        raise RuntimeError(job["detail"])
    if job["state"] == "failed":
        call(f"/v1/jobs/{job['id']}/retry", {})
    print(f"job {job['id']}")
    while True:
        status, result = call(f"/v1/jobs/{job['id']}/result")
        if status == 200:
            return result["output"]["uri"]
        if status not in (202, 429, 503):
            raise RuntimeError(result["detail"])
        time.sleep(2)


@dsl.pipeline(name="merge")
def merge_pipeline(service_url: str, recipe: str, output_uri: str) -> str:
    """Put training before it and evaluation after it."""
    step = merge(
        service_url=service_url,
        recipe=recipe,
        output_uri=output_uri,
        run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
    )
    step.set_caching_options(enable_caching=False)  # the service knows what is there already
    return step.output


if __name__ == "__main__":
    compiler.Compiler().compile(merge_pipeline, "merge_pipeline.yaml")
