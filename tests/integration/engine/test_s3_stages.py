"""Merges in several stages from S3 to S3, against a real server that counts what it sends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from examples.s3_server import S3Server
from merging.execute.shard import run_shard
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.plan.stages import shards_needed
from merging.publish import publish
from merging.receipts import Receipt
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.checkpoints import make_family
from tests.support.merges import recipe, weight_bytes
from tests.support.s3_models import download_prefix, upload_folder

pytestmark = pytest.mark.s3


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("ties", {"scope": "global", "density": 0.3}), ("iso_wudi", {}), ("wudi", {"steps": 500})],
)
def test_the_server_sends_exactly_the_planned_bytes(
    s3_env: S3Server, bucket: str, tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    """The third is a layer that is divided over several workers."""
    family = make_family(tmp_path / "models", num_experts=3, hidden=128, layers=1, shards=2)
    storage = open_storage()
    options = MergeOptions(max_shard_size="300kB", workers=8)
    local = recipe(family, method, **parameters)
    remote = {
        **local,
        "base_model": upload_folder(s3_env, family.base, bucket, "base"),
        "models": [
            {"model": upload_folder(s3_env, expert, bucket, f"experts/{number}")}
            for number, expert in enumerate(family.experts)
        ],
    }
    plan = make_plan(parse_recipe(remote), storage, options, f"s3://{bucket}/merged")
    needed = shards_needed(plan)
    assert any(needed)
    receipts: list[Receipt] = []
    for shard in plan.shards:
        before = s3_env.bytes_sent(bucket)
        versions = {index: receipts[index].versions for index in needed[shard.index]}
        receipts.append(run_shard(plan.work(shard.index, plan.digest, versions), storage))
        assert s3_env.bytes_sent(bucket) - before == shard.bytes_read
    publish(plan, receipts, storage)
    assert not [item for item in storage.list(f"s3://{bucket}/merged") if ".mergeyard" in item.uri]
    run_plan(make_plan(parse_recipe(local), storage, options, str(tmp_path / "local")), storage)
    copy = download_prefix(s3_env, f"s3://{bucket}/merged", tmp_path / "copy")
    assert weight_bytes(copy) == weight_bytes(tmp_path / "local")
