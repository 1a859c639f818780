"""Sweeps from S3 to S3, against a real server that counts what it sends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from examples.s3_server import S3Server
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.checkpoints import make_family
from tests.support.s3_models import upload_folder

pytestmark = pytest.mark.s3

FAMILY = [
    {"name": "adam", "parameters": {"steps": 2}},
    {"name": "slow", "parameters": {"steps": 2, "learning_rate": 1e-6}},
    {"name": "ridge", "merge_method": "wudi_cfs"},
    {"name": "hard", "merge_method": "swudi_a"},
]
DENSITIES = [{"name": f"d-{n}", "parameters": {"density": n / 10}} for n in (2, 4, 6)]


@pytest.mark.parametrize(("method", "variants"), [("wudi", FAMILY), ("ties", DENSITIES)])
def test_many_variants_read_as_much_as_one(
    s3_env: S3Server, bucket: str, tmp_path: Path, method: str, variants: list[dict[str, Any]]
) -> None:
    family = make_family(tmp_path / "models", num_experts=3, hidden=128, layers=2, shards=2)
    shared = {
        "merge_method": method,
        "base_model": upload_folder(s3_env, family.base, bucket, "base"),
        "models": [
            {"model": upload_folder(s3_env, expert, bucket, f"experts/{number}")}
            for number, expert in enumerate(family.experts)
        ],
    }
    storage = open_storage()
    options = MergeOptions(max_shard_size="1MB", memory_budget="16MiB")

    def bytes_sent(plan: Plan) -> tuple[int, dict[str, Any]]:
        """What the server sends for the shards, and the report."""
        planned = plan.totals.bytes_read
        before = s3_env.bytes_sent(bucket)
        report = run_plan(plan, storage)
        assert report["bytes_read"] == planned
        return s3_env.bytes_sent(bucket) - before, report

    alone = {**shared, "parameters": variants[0]["parameters"]}
    plan = make_plan(parse_recipe(alone), storage, options, f"s3://{bucket}/alone")
    one, _ = bytes_sent(plan)
    document = {**shared, "sweep": variants}
    swept = make_plan(parse_recipe(document), storage, options, f"s3://{bucket}/sweep")
    assert len(swept.shards) == len(plan.shards) > 1
    many, report = bytes_sent(swept)
    assert swept.totals.bytes_read == plan.totals.bytes_read
    assert report["output"]["bytes"] == swept.totals.bytes_written
    # Beside the weights the server sends small files: headers to verify, companions to copy.
    small = one - plan.totals.bytes_read
    assert small < plan.totals.bytes_read / 20
    assert many - swept.totals.bytes_read <= (len(variants) + 1) * small
    assert not [item for item in storage.list(f"s3://{bucket}/sweep") if ".mergeyard" in item.uri]
