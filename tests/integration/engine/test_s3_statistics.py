"""Experts in S3 run on samples in S3: the server sends what the plan says, shard by shard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.s3_server import S3Server
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.publish import publish
from merging.receipts import Receipt
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.calibrated import SAMPLES, calibrated_recipe, run_shards, write_models
from tests.support.merges import weight_bytes
from tests.support.s3_models import download_prefix, upload_folder

pytestmark = [pytest.mark.s3, pytest.mark.slow]


@pytest.mark.parametrize("method", ["lot", "regmean_plus_plus"])
def test_the_server_sends_exactly_the_planned_bytes(
    s3_env: S3Server, bucket: str, tmp_path: Path, method: str
) -> None:
    paths = write_models(tmp_path / "models", "llama", 2)
    samples = tmp_path / "samples"
    samples.mkdir()
    lines = [json.dumps({"ids": sample}) for sample in SAMPLES]
    (samples / "all.jsonl").write_text("\n".join(lines))
    local = calibrated_recipe(paths, method, data=str(samples / "all.jsonl"), field="ids")
    folder = upload_folder(s3_env, samples, bucket, "samples")
    uris = [upload_folder(s3_env, path, bucket, path.name) for path in paths]
    remote = calibrated_recipe(uris, method, data=f"{folder}/all.jsonl", field="ids")
    storage, options = open_storage(), MergeOptions()
    plan = make_plan(parse_recipe(remote), storage, options, f"s3://{bucket}/merged")
    receipts: dict[int, Receipt] = {}
    for shard in plan.shards:
        before = s3_env.bytes_sent(bucket)
        run_shards(plan, storage, [shard], receipts)
        assert s3_env.bytes_sent(bucket) - before == shard.bytes_read
        assert receipts[shard.index].bytes_read == shard.bytes_read
    publish(plan, list(receipts.values()), storage)
    assert not [item for item in storage.list(f"s3://{bucket}/merged") if ".mergeyard" in item.uri]
    run_plan(make_plan(parse_recipe(local), storage, options, str(tmp_path / "local")), storage)
    copy = download_prefix(s3_env, f"s3://{bucket}/merged", tmp_path / "copy")
    assert weight_bytes(copy) == weight_bytes(tmp_path / "local")


def test_a_second_merge_reads_what_is_kept_and_no_expert_for_it(
    s3_env: S3Server, bucket: str, tmp_path: Path
) -> None:
    paths = write_models(tmp_path / "models", "gpt2", 2)
    uris = [upload_folder(s3_env, path, bucket, path.name) for path in paths]
    storage, kept = open_storage(), f"s3://{bucket}/kept"
    first, second = (
        make_plan(
            parse_recipe(calibrated_recipe(uris, method)),
            storage,
            MergeOptions(statistics_uri=kept),
            f"s3://{bucket}/{method}",
        )
        for method in ("lot", "cat")
    )
    run_plan(first, storage)
    receipts: dict[int, Receipt] = {}
    for shard in second.shards:
        before = s3_env.bytes_sent(bucket)
        run_shards(second, storage, [shard], receipts)
        sent = s3_env.bytes_sent(bucket) - before
        if shard.folder:
            record = storage.stat(f"{kept}/{shard.file_name}.json").size
            assert sent == shard.size + record
            assert receipts[shard.index].bytes_read == shard.size
            assert receipts[shard.index].reused
        else:
            assert sent == receipts[shard.index].bytes_read == shard.bytes_read
    report = publish(second, list(receipts.values()), storage)
    assert report["bytes_intermediate"] == 0
    assert len(storage.list(kept)) == 2 * len([s for s in first.shards if s.folder])
