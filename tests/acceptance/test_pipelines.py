"""The examples for other people's pipelines, with their real packages, against a live service."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from service.client import ApiError
from tests.support.checkpoints import INDEX_NAME, Family, make_family
from tests.support.documents import REPOSITORY
from tests.support.environments import plain_environment, python_with
from tests.support.live_service import LiveService

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first run installs packages

EXAMPLES = REPOSITORY / "examples"
KUBEFLOW = EXAMPLES / "kubeflow" / "merge_component.py"
AIRFLOW = EXAMPLES / "airflow" / "merge_dag.py"


def recipe(family: Family) -> str:
    return yaml.safe_dump(
        {
            "merge_method": "linear",
            "models": [{"model": str(expert)} for expert in family.experts],
            "parameters": {"weight": 0.5},
        }
    )


def run(python: Path, *arguments: str, cwd: Path, **variables: str) -> Any:
    return subprocess.run(
        [str(python), *arguments],
        cwd=cwd,
        env=plain_environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
    )


# -- Kubeflow Pipelines


@pytest.fixture(scope="module")
def kfp() -> Path:
    return python_with("kfp", "2.17.0")


COMPONENT = """
import json, runpy, sys
component = runpy.run_path(sys.argv[1])["merge"].python_func
print(json.dumps(component(**json.loads(sys.argv[2]))))
"""


def merge_in_a_step(
    kfp: Path, service: LiveService, tmp_path: Path, **arguments: str
) -> subprocess.CompletedProcess[str]:
    """The function that the step's container runs."""
    given = json.dumps({"service_url": service.url, **arguments})
    return run(
        kfp, "-c", COMPONENT, str(KUBEFLOW), given, cwd=tmp_path, MERGEYARD_TOKEN=service.token
    )


def test_the_component_merges_and_may_be_run_again(
    kfp: Path, service: LiveService, family: Family, tmp_path: Path
) -> None:
    output = str(tmp_path / "by-component")
    arguments = {"recipe": recipe(family), "output_uri": output, "run_id": "run-1"}
    first, again = (merge_in_a_step(kfp, service, tmp_path, **arguments) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout.splitlines()[-1]) == output
    assert (tmp_path / "by-component" / INDEX_NAME).exists()
    assert again.stdout == first.stdout  # the same job


def test_the_component_fails_with_the_services_reason(
    kfp: Path, service: LiveService, family: Family, tmp_path: Path
) -> None:
    outside = {"recipe": recipe(family), "output_uri": "/elsewhere", "run_id": "run-2"}
    done = merge_in_a_step(kfp, service, tmp_path, **outside)
    assert done.returncode != 0
    with service.client() as client, pytest.raises(ApiError) as refused:
        client.submit(outside["recipe"], outside["output_uri"])
    assert refused.value.detail in done.stderr


def test_a_step_that_is_run_again_after_a_failure_goes_on(
    kfp: Path, service: LiveService, tmp_path: Path
) -> None:
    family = make_family(tmp_path / "models", num_experts=2, hidden=32, vocab=64)
    weights = family.experts[0] / "model.safetensors"
    state = load_file(weights)
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in state.items()}
    save_file(broken, weights, {"format": "pt"})
    output = str(tmp_path / "out")
    arguments = {"recipe": recipe(family), "output_uri": output, "run_id": "run-3"}
    failed = merge_in_a_step(kfp, service, tmp_path, **arguments)
    assert failed.returncode != 0
    assert "NaN" in failed.stderr
    save_file(state, weights, {"format": "pt"})
    again = merge_in_a_step(kfp, service, tmp_path, **arguments)
    assert again.returncode == 0, again.stderr
    with service.client() as client:
        (job,) = [job for job in client.jobs() if job["output_uri"] == output]
    assert (job["state"], job["attempt"]) == ("succeeded", 2)


def test_the_pipeline_compiles(kfp: Path, tmp_path: Path) -> None:
    done = run(kfp, str(KUBEFLOW), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pipeline = next(yaml.safe_load_all((tmp_path / "merge_pipeline.yaml").read_text()))
    assert pipeline["pipelineInfo"]["name"] == "merge"
    asked = pipeline["root"]["inputDefinitions"]["parameters"]
    assert asked.keys() == {"service_url", "recipe", "output_uri"}
    (step,) = pipeline["root"]["dag"]["tasks"].values()
    assert step["cachingOptions"] == {}


# -- Airflow


@pytest.fixture(scope="module")
def airflow() -> Path:
    return python_with("apache-airflow", AIRFLOW_VERSION)


AIRFLOW_VERSION = "3.3.2"


def test_the_dag_merges(
    airflow: Path, service: LiveService, family: Family, tmp_path: Path
) -> None:
    """Airflow's own test run of a DAG: its tasks and its sensor, without scheduler and server."""
    output = str(tmp_path / "by-dag")
    connection = {"conn_type": "generic", "host": service.url, "password": service.token}
    variables = {
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "AIRFLOW__CORE__UNIT_TEST_MODE": "false",
        "AIRFLOW_CONN_MERGEYARD": json.dumps(connection),
    }
    (tmp_path / "airflow" / "dags").mkdir(parents=True)
    quick = AIRFLOW.read_text().replace("poke_interval=30", "poke_interval=1")
    (tmp_path / "airflow" / "dags" / AIRFLOW.name).write_text(quick)
    given = json.dumps({"recipe": recipe(family), "output_uri": output})
    for command in (
        ["db", "migrate"],
        ["dags", "test", "merge_models", "--conf", given],
    ):
        done = run(airflow, "-m", "airflow", *command, cwd=tmp_path, **variables)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "by-dag" / INDEX_NAME).exists()
    with service.client() as client:
        jobs = [job for job in client.jobs() if job["output_uri"] == output]
    assert [job["state"] for job in jobs] == ["succeeded"]
