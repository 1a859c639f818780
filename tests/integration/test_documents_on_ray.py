"""Documents over models of different vocabularies, as a job of the service on its own Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.jobs_over_http import finish, shard_states, shards, wait_for
from tests.support.merges import weight_bytes
from tests.support.service_process import running_service
from tests.support.tokenizers import write_model

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

WORDS = {"base": "abcd", "chat": "dcabx", "code": "axbcd", "late": "yabcd"}
OPTIONS = {"max_shard_size": "16KB"}


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    """Two steps: the second one grows the vocabulary of the first one's result."""
    for seed, (name, words) in enumerate(WORDS.items()):
        write_model(tmp_path / name, ["<unk>", *words], ["</s>"], seed=seed)
    model = {name: {"model": str(tmp_path / name)} for name in WORDS}
    first = {
        "name": "first",
        "merge_method": "wudi",
        "base_model": model["base"]["model"],
        "models": [model["chat"], model["code"]],
        "parameters": {"steps": 600},
        "tokenizer_source": "union",
    }
    last = {
        "merge_method": "ties",
        "base_model": "first",
        "models": [model["late"], model["chat"]],
        "parameters": {"density": 0.5},
        "tokenizer": {"source": "union", "pad_to_multiple_of": 8},
    }
    return {"documents": [last, first]}


def test_a_retry_goes_on_where_a_step_failed_to_the_bytes_of_one_run(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    storage, output = open_storage(), tmp_path / "out"
    here = make_plan(
        parse_recipe(document), storage, MergeOptions(**OPTIONS), str(tmp_path / "here")
    )
    run_plan(here, storage)
    needed = tmp_path / "late/model.safetensors"
    with (
        running_service(
            tmp_path / "data", [str(tmp_path)], {"MERGEYARD_RAY_NUM_CPUS": "1"}
        ) as service,
        service.client() as client,
    ):
        job_id = str(client.submit(document, str(output), options=OPTIONS)["id"])
        wait_for(lambda: "succeeded" in shard_states(client, job_id), "the first shard")
        away = needed.rename(tmp_path / "away")
        job, _ = finish(client, job_id)
        assert (job["state"], job["error"]["code"]) == ("failed", "storage_not_found")
        assert not (output / "config.json").exists()
        done = receipts(shards(client, job_id))
        away.rename(needed)
        client.retry(job_id)
        job = wait_for(lambda: ended(client.job(job_id)), "the end of the retried job")
        assert job["state"] == "succeeded", job["error"]
        found = receipts(shards(client, job_id))
        report = client.report(job_id)
    assert 0 < len(done) < len(found) == len(here.shards)
    assert done.items() <= found.items()
    assert weight_bytes(output) == weight_bytes(tmp_path / "here")
    assert not (output / ".mergeyard").exists()
    assert {item["uri"] for item in report["inputs"]} == {str(tmp_path / name) for name in WORDS}
    assert report["bytes_read"] == here.totals.bytes_read
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert set(tokenizer.get_vocab()) == {"<unk>", "</s>", *"abcdxy"}
    assert json.loads((output / "config.json").read_text())["vocab_size"] == 8


def receipts(found: list[dict[str, Any]]) -> dict[int, str]:
    """Those of the shards that are done: what was read, when and by whom."""
    return {
        shard["index"]: json.dumps(shard["receipt"])
        for shard in found
        if shard["state"] == "succeeded"
    }


def ended(job: dict[str, Any]) -> dict[str, Any] | None:
    """The job, once it has ended."""
    return job if job["is_terminal"] else None
