"""What importing costs: nobody loads libraries that are only needed elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLOUD = {"boto3", "botocore"}
NUMERICS = {"torch", "numpy", "safetensors"}
CLUSTER = {"ray"}
WEB = {"fastapi", "starlette", "uvicorn", "httpx"}
DATABASE = {"sqlalchemy", "alembic", "psycopg"}
TRACES = {"opentelemetry"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("merging", NUMERICS | CLOUD | CLUSTER | WEB | DATABASE | {"yaml", "pydantic"}),
        ("merging.recipe", NUMERICS | CLOUD | CLUSTER | WEB | DATABASE),
        ("merging.plan.planner", NUMERICS | CLOUD | CLUSTER | WEB | DATABASE),
        ("merging.local_run", NUMERICS | CLOUD | CLUSTER | WEB | DATABASE),
        ("merging.storage.router", NUMERICS | CLOUD | CLUSTER | WEB | DATABASE),
        ("workers.messages", NUMERICS | CLOUD | CLUSTER | WEB | DATABASE),
        ("workers.local_pool", NUMERICS | CLOUD | CLUSTER | WEB | DATABASE | TRACES),
        ("service.main", {"opentelemetry.sdk", "opentelemetry.exporter"}),
        ("workers.ray_pool", NUMERICS | CLOUD | CLUSTER | WEB | DATABASE),
        ("service.client", NUMERICS | CLOUD | CLUSTER | DATABASE | {"fastapi", "pydantic"}),
        ("service.console", NUMERICS | CLOUD | CLUSTER | WEB | DATABASE),
        ("service.cli", NUMERICS | CLOUD | CLUSTER | WEB | DATABASE | {"pydantic", "yaml"}),
    ],
)
def test_a_module_loads_what_it_needs_and_no_more(module: str, unwanted: set[str]) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert module in done.stdout.split()
    assert not unwanted & set(done.stdout.split())
