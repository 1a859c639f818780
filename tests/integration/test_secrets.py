"""Secrets of a deployment, planted and then looked for in everything that can be read."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.s3_stand_in import misbehaving_s3
from tests.support.serving import REPOSITORY, environment, served

KEY_ID = "AKIAPLANTEDPLANTED00"
SECRET_KEY = "planted/SecretKey+0123456789abcdefghijkl"
SESSION = "planted-session-token-0123456789"
PASSWORD = "planted-password"


def everything(folder: Path) -> dict[str, bytes]:
    """Every file that the service has written: log, database, its own folder."""
    found = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if "admin-token" not in name}


def look_for(secrets: dict[str, str], places: dict[str, bytes]) -> list[tuple[str, str]]:
    return [
        (what, where)
        for where, data in places.items()
        for what, secret in secrets.items()
        if secret.encode() in data
    ]


@pytest.mark.slow
def test_no_secret_shows_in_answers_events_logs_or_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.checkpoints import make_family

    family = make_family(tmp_path / "models", num_experts=2)
    said: dict[str, bytes] = {}
    with misbehaving_s3(b"") as s3:
        s3.statuses = [403] * 1000
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        monkeypatch.setenv("AWS_SESSION_TOKEN", SESSION)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3.server_port}")
        roots = f"{tmp_path},s3://bucket"
        with served(tmp_path, storage_roots=roots) as service:
            http = service.client
            secrets = {
                "key id": KEY_ID,
                "secret key": SECRET_KEY,
                "session token": SESSION,
                "admin token": http.headers["authorization"].split()[1],
                "link": service.output[-2].rpartition("code=")[2].strip(),
            }
            made = http.post("/v1/tokens", json={"name": "x", "scopes": ["jobs:read"]}).json()
            secrets["new token"] = made["secret"]
            secrets["cookie"] = http.post("/v1/sessions").cookies["mergeyard_session"]
            http.cookies.clear()
            recipe = {
                "merge_method": "task_arithmetic",
                "base_model": str(family.base),
                "models": [{"model": str(expert)} for expert in family.experts],
            }
            denied = {**recipe, "base_model": "s3://bucket/base"}
            for base in (denied, recipe):
                output = str(tmp_path / "merged")
                body = {"recipe": base, "output_uri": output}
                answer = http.post("/v1/jobs", json=body)
                said[f"submission {answer.status_code}"] = answer.content
            job_id = answer.json()["id"]
            for path in ("logs?follow=true", "events", "shards", "report", ""):
                said[path] = http.get(f"/v1/jobs/{job_id}/{path}".rstrip("/")).content
            for path in ("/v1/tokens", "/v1/sessions/current", "/metrics", "/v1/version"):
                said[path] = http.get(path).content
            for bad in (SECRET_KEY, "mergeyard_" + "x" * 50):
                wrong = {"Authorization": f"Bearer {bad}"}
                said[f"refusal {bad[:9]}"] = httpx.get(
                    f"{service.url}/v1/jobs?token={bad}", headers=wrong
                ).content
            assert service.terminate() == 0
    assert any("submission 4" in name for name in said)
    with sqlite3.connect(tmp_path / "data" / "mergeyard.db") as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        dump = "\n".join(database.iterdump())
    database.close()
    places = {**everything(tmp_path / "data"), **everything(tmp_path / "merged"), **said}
    places |= {"log": (tmp_path / "service.log").read_bytes(), "database": dump.encode()}
    assert look_for(secrets, places) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://merge:{PASSWORD}@127.0.0.1:1/jobs",
        f"mysql://merge:{PASSWORD}@127.0.0.1/jobs",
        f"postgresql://merge:{PASSWORD}@[/jobs",
        f"postgresql://127.0.0.1:1/jobs?password={PASSWORD}",
    ],
)
def test_a_database_that_cannot_be_used_is_named_without_its_password(
    tmp_path: Path, url: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", "serve"],
        cwd=REPOSITORY,
        env=environment(tmp_path, database_url=url),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr
    assert PASSWORD not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
