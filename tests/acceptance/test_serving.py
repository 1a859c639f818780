"""What docs/serving.md says of outputs is so."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from merging.local_run import run_plan
from merging.storage.router import open_storage
from tests.support.checkpoints import INDEX_NAME, Family
from tests.support.documents import REPOSITORY, blocks
from tests.support.merges import plan_merge

DOCUMENT = REPOSITORY / "docs" / "serving.md"


@pytest.fixture
def merged(family: Family, tmp_path: Path) -> Path:
    """A merge by somebody with the usual umask."""
    storage = open_storage()
    before = os.umask(0o022)
    try:
        plan = plan_merge(
            family, "task_arithmetic", storage, tmp_path / "out", max_shard_size="1MB"
        )
        run_plan(plan, storage)
    finally:
        os.umask(before)
    return tmp_path / "out"


def test_every_file_can_be_read_by_other_users(merged: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in merged.iterdir()}
    assert set(modes.values()) == {0o644}


def test_the_files_are_those_that_servers_look_for(merged: Path, family: Family) -> None:
    names = {path.name for path in merged.iterdir()}
    rows = re.findall(r"^\| (`.*?) \|", DOCUMENT.read_text(), re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`([\w.]+\.json|README\.md)`", row)}
    assert {INDEX_NAME, "config.json", "README.md", "merge_report.json"} <= told
    there = {path.name for path in family.base.iterdir()}
    assert told & there | (told - {"generation_config.json"}) <= names
    weights = {name for name in names if name.endswith(".safetensors")}
    index = json.loads((merged / INDEX_NAME).read_text())
    assert set(index["weight_map"].values()) == weights
    size = 0
    for name in weights:
        with safe_open(merged / name, "pt") as file:
            assert {t for t, n in index["weight_map"].items() if n == name} == set(file.keys())
            size += sum(file.get_tensor(t).nbytes for t in file.keys())  # noqa: SIM118 - no mapping
    assert index["metadata"]["total_size"] == size


def test_the_example_of_a_deployment_is_one() -> None:
    (example,) = blocks(DOCUMENT, "yaml")
    service = yaml.safe_load(example.text)
    assert (service["apiVersion"], service["kind"]) == (
        "serving.kserve.io/v1beta1",
        "InferenceService",
    )
    model = service["spec"]["predictor"]["model"]
    assert model["storageUri"].startswith("s3://")
    assert model["modelFormat"] == {"name": "huggingface"}
