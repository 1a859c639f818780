"""The service as a process: first start, clear refusals, ending, and going on after a restart."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.client import Client
from service.jobs.sql_store import open_store
from tests.support.serving import REPOSITORY, environment, served

NEVER_LOADED = ("torch", "ray", "boto3", "transformers")

LOADED_BY_THE_CONTROLLER = """
import asyncio, json, sys, tempfile
from pathlib import Path
import httpx
import service.main
from service.app import create_app
from service.jobs.sql_store import open_store
from service.settings import load_settings
from tests.support.api import RECIPE
from tests.support.header_checkpoints import llama_tensors, put_checkpoint
from tests.support.memory_storage import MemoryStorage

async def use(app, secret):
    transport = httpx.ASGITransport(app)
    headers = {"Authorization": f"Bearer {secret}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as http:
        assert (await http.get("/v1/methods")).status_code == 200
        body = {"recipe": RECIPE, "output_uri": "mem://out/x"}
        assert (await http.post("/v1/jobs", json=body)).status_code == 201

with tempfile.TemporaryDirectory() as folder:
    settings = load_settings(data_dir=folder)
    store = open_store(settings.effective_database_url)
    storage = MemoryStorage()
    for name in ("a", "b"):
        put_checkpoint(storage, f"mem://models/{name}", llama_tensors(layers=1))
    _, secret = store.create_token("test", ["admin"])
    asyncio.run(use(create_app(settings, store, storage=storage), secret))
    store.close()
print(json.dumps(sorted(sys.modules)))
"""


def run(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_controller_loads_no_heavy_library(tmp_path: Path) -> None:
    done = run("-c", LOADED_BY_THE_CONTROLLER, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & set(NEVER_LOADED)


@pytest.mark.slow
def test_the_first_start_offers_a_link_that_logs_in_once(tmp_path: Path) -> None:
    with served(tmp_path) as service:
        token_file = tmp_path / "data" / "admin-token"
        secret = token_file.read_text().strip()
        assert token_file.stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
        output = "".join(service.output)
        assert secret not in output
        assert str(token_file) in output
        (link,) = (word for word in output.split() if word.startswith(f"{service.url}/auth?code="))
        with httpx.Client(base_url=service.url) as browser:
            assert browser.get(link).headers["location"] == "/"
            assert browser.get("/v1/sessions/current").json()["scopes"] == ["admin"]
            assert browser.get(link).status_code == 401
        checks = service.client.get("/readyz").json()["checks"]
        assert {check["name"]: check["status"] for check in checks} == {
            "database": "ok",
            "runner": "ok",
            "webhooks": "ok",
        }
        assert service.client.get("/v1/jobs").status_code == 200
        assert service.terminate() == 0
    with served(tmp_path) as service:
        assert "/auth?code=" not in "".join(service.output)
        assert service.client.get("/v1/jobs").status_code == 200
        assert service.terminate() == 0
    log = (tmp_path / "service.log").read_text()
    assert secret not in log
    assert link.partition("=")[2] not in log


@pytest.mark.slow
def test_log_lines_are_json_with_the_request_id(tmp_path: Path) -> None:
    with served(tmp_path) as service:
        service.client.get("/v1/jobs/counts", headers={"X-Request-Id": "find-me"})
        service.terminate()
    lines = [json.loads(line) for line in (tmp_path / "service.log").read_text().splitlines()]
    (line,) = (line for line in lines if line.get("request_id") == "find-me")
    assert (line["event"], line["status"], line["path"]) == ("request", 200, "/v1/jobs/counts")


@pytest.mark.slow
def test_a_configured_token_is_used_and_not_shown(tmp_path: Path) -> None:
    secret = "a-secret-of-the-deployment"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "admin-token").write_text(secret)  # for the client of this test
    with served(tmp_path, admin_token=secret) as service:
        assert service.client.get("/v1/tokens").status_code == 200
        assert secret not in "".join(service.output)
    assert secret not in (tmp_path / "service.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"host": "0.0.0.0", "storage_roots": ""}, "MERGEYARD_STORAGE_ROOTS"),
        ({"port": "tcp://10.0.0.1:80"}, "enableServiceLinks"),
        ({"database_url": "mysql://u:hidden@h/d"}, "MERGEYARD_DATABASE_URL"),
        ({"database_url": "nonsense"}, "MERGEYARD_DATABASE_URL"),
        ({"data_dir": "/dev/null/x"}, "MERGEYARD_DATA_DIR"),
    ],
)
def test_settings_that_cannot_be_used_are_named_without_a_trace(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    done = run("-m", "service.cli", "serve", env=environment(tmp_path, **settings))
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "hidden" not in done.stderr


@pytest.mark.slow
def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("-m", "service.cli", "serve", env=environment(tmp_path, port=port))
    assert done.returncode == 1
    assert f"port {port}: another process listens there" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_job_goes_on_at_once_after_a_restart(tmp_path: Path) -> None:
    from tests.support.checkpoints import make_family

    family = make_family(tmp_path / "models", num_experts=2)
    recipe = {
        "merge_method": "wudi",
        "base_model": str(family.base),
        "models": [{"model": str(expert)} for expert in family.experts],
    }
    # With such a lease, a job that was not given back would not go on within this test.
    with served(tmp_path, lease_seconds=3600) as service:
        client = Client(service.url, service.client.headers["authorization"].split()[1])
        options = {"max_shard_size": "100kB"}
        job_id = client.submit(recipe, str(tmp_path / "merged"), options=options)["id"]
        for event in client.events(job_id):
            if event["type"] == "shard.started":
                break
        client.close()
        assert service.terminate() == 0
    with served(tmp_path, lease_seconds=3600) as service:
        client = Client(service.url, service.client.headers["authorization"].split()[1])
        events = list(client.events(job_id))
        assert client.job(job_id)["state"] == "succeeded"
        client.close()
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        assert sum(event["type"] == "job.finished" for event in events) == 1
        assert service.terminate() == 0
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists()


@pytest.mark.slow
def test_a_stopped_service_answers_no_more(tmp_path: Path) -> None:
    with served(tmp_path) as service:
        assert service.terminate() == 0
        with pytest.raises(httpx.TransportError):
            service.client.get("/healthz")


@pytest.mark.slow
def test_a_replica_that_only_answers_leaves_jobs_to_one_that_drives(tmp_path: Path) -> None:
    from tests.support.checkpoints import make_family

    family = make_family(tmp_path / "models", num_experts=2)
    with served(tmp_path, run_jobs=False) as front:
        names = {check["name"] for check in front.client.get("/readyz").json()["checks"]}
        assert names == {"database", "webhooks"}
        with Client(front.url, front.client.headers["authorization"].split()[1]) as client:
            recipe = {
                "merge_method": "linear",
                "models": [{"model": str(expert)} for expert in family.experts],
            }
            job_id = client.submit(recipe, str(tmp_path / "merged"))["id"]
            with served(tmp_path) as driver:
                events = list(client.events(job_id))
                assert driver.terminate() == 0
            assert events[-1]["type"] == "job.finished"
            assert client.job(job_id)["state"] == "succeeded"


@pytest.mark.slow
def test_the_database_can_be_migrated_apart(tmp_path: Path) -> None:
    done = run("-m", "service.cli", "migrate", env=environment(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "has the schema of this version" in done.stdout
    store = open_store(f"sqlite:///{tmp_path}/data/mergeyard.db", migrate=False)
    store.ping()
    store.close()
