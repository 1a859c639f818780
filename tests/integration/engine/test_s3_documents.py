"""Documents over models of different vocabularies, from S3 to S3, byte by byte as planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

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
from tests.support.merges import weight_bytes
from tests.support.s3_models import download_prefix, upload_folder
from tests.support.tokenizers import write_model

pytestmark = pytest.mark.s3

WORDS = {"a": "abcdefgh", "b": "hgxabc", "c": "yefa"}


def documents(folders: dict[str, str]) -> dict[str, Any]:
    def entry(model: str, weight: float) -> dict[str, Any]:
        return {"model": model, "parameters": {"weight": weight}}

    first = {
        "name": "both",
        "merge_method": "linear",
        "models": [entry(folders["a"], 1), entry(folders["b"], 2)],
        "tokenizer_source": "union",
    }
    last = {
        "merge_method": "ties",
        "base_model": "both",
        "models": [entry(folders["c"], 1), entry(folders["a"], 0.5)],
        "parameters": {"density": 0.5},
        "tokenizer": {"source": "union", "pad_to_multiple_of": 8},
    }
    return {"documents": [last, first]}


def test_the_server_sends_exactly_the_planned_bytes(
    s3_env: S3Server, bucket: str, tmp_path: Path
) -> None:
    for seed, (name, words) in enumerate(WORDS.items()):
        write_model(tmp_path / name, ["<unk>", *words], ["</s>"], seed=seed)
    local = {name: str(tmp_path / name) for name in WORDS}
    remote = {name: upload_folder(s3_env, tmp_path / name, bucket, name) for name in WORDS}
    storage, options = open_storage(), MergeOptions(max_shard_size="20kB")
    plan = make_plan(parse_recipe(documents(remote)), storage, options, f"s3://{bucket}/merged")
    needed = shards_needed(plan)
    receipts: list[Receipt] = []
    for shard in plan.shards:
        before = s3_env.bytes_sent(bucket)
        versions = {index: receipts[index].versions for index in needed[shard.index]}
        receipts.append(run_shard(plan.work(shard.index, plan.digest, versions), storage))
        assert s3_env.bytes_sent(bucket) - before == shard.bytes_read
    publish(plan, receipts, storage)
    run_plan(
        make_plan(parse_recipe(documents(local)), storage, options, str(tmp_path / "local")),
        storage,
    )
    copy = download_prefix(s3_env, f"s3://{bucket}/merged", tmp_path / "copy")
    assert weight_bytes(copy) == weight_bytes(tmp_path / "local")
    assert not list(copy.glob(".mergeyard/**/*"))
    tokenizer = AutoTokenizer.from_pretrained(copy)
    assert set(tokenizer.get_vocab()) == {"<unk>", "</s>", *"abcdefghxy"}
    assert json.loads((copy / "config.json").read_text())["vocab_size"] == 16
