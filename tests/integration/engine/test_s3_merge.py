"""Merges from S3 to S3, against a real server."""

import pytest
import torch

from merging.execute.shard import run_shard
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.publish import publish
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.checkpoints import make_family
from tests.support.merges import load_merged, plan_merge
from tests.support.s3_models import download_prefix, upload_folder

pytestmark = pytest.mark.s3


@pytest.fixture
def family(tmp_path):
    return make_family(tmp_path / "models", num_experts=3, hidden=128, layers=3, shards=3)


def s3_recipe(s3, family, bucket, method):
    document = {
        "merge_method": method,
        "models": [
            {"model": upload_folder(s3, expert, bucket, f"experts/{number}")}
            for number, expert in enumerate(family.experts)
        ],
    }
    if method != "linear":
        document["base_model"] = upload_folder(s3, family.base, bucket, "base")
    return parse_recipe(document)


@pytest.mark.parametrize("method", ["linear", "wudi"])
def test_the_server_sends_exactly_the_planned_bytes(s3_env, family, bucket, tmp_path, method):
    storage = open_storage()
    recipe = s3_recipe(s3_env, family, bucket, method)
    options = MergeOptions(max_shard_size="1MB", memory_budget="16MiB")
    plan = make_plan(recipe, storage, options, f"s3://{bucket}/merged")
    assert len(plan.shards) > 1
    digest = plan.digest
    receipts = []
    for shard in plan.shards:
        before = s3_env.bytes_sent(bucket)
        receipts.append(run_shard(plan.work(shard.index, digest), storage))
        assert s3_env.bytes_sent(bucket) - before == shard.bytes_read
    assert sum(receipt.bytes_read for receipt in receipts) == plan.totals.bytes_read
    publish(plan, receipts, storage)


def test_s3_and_local_files_give_the_same_bytes(s3_env, family, bucket, tmp_path):
    storage = open_storage()
    recipe = s3_recipe(s3_env, family, bucket, "wudi_cfs")
    output = f"s3://{bucket}/merged"
    options = MergeOptions(max_shard_size="1MB")
    remote = run_plan(make_plan(recipe, storage, options, output), storage)
    local_plan = plan_merge(family, "wudi_cfs", storage, tmp_path / "local", max_shard_size="1MB")
    local = run_plan(local_plan, storage)
    assert remote["output"]["digest"] == local["output"]["digest"]
    fetched = load_merged(download_prefix(s3_env, output, tmp_path / "fetched"))
    for name, tensor in load_merged(tmp_path / "local").items():
        assert torch.equal(fetched[name], tensor)


def test_a_finished_merge_leaves_neither_workspace_nor_open_uploads(s3_env, family, bucket):
    storage = open_storage()
    recipe = s3_recipe(s3_env, family, bucket, "linear")
    output = f"s3://{bucket}/merged"
    run_plan(make_plan(recipe, storage, MergeOptions(), output), storage)
    names = [item.uri.removeprefix(output + "/") for item in storage.list(output)]
    assert "model.safetensors.index.json" in names
    assert not [name for name in names if name.startswith(".mergeyard")]
    assert s3_env.client().list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []
