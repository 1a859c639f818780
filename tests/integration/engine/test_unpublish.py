"""Removing what a merge published: on files, and on a real S3 server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from merging.errors import StorageError
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.publish import INDEX_NAME
from merging.recipe import parse_recipe
from merging.report import REPORT_NAME, SWEEP_REPORT_NAME
from merging.storage.base import Storage
from merging.storage.router import open_storage
from merging.unpublish import unpublish
from tests.support.checkpoints import make_family
from tests.support.merges import plan_merge, recipe

FOREIGN = ("notes.txt", "adapter.safetensors", "checkpoint-7/model.safetensors")


class Fragile:
    """The real storage, which notes what is deleted and may fail from one deletion on."""

    def __init__(self, inner: Storage, lasts: int = 1000) -> None:
        self._inner = inner
        self._lasts = lasts
        self.deleted: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def delete(self, uri: str) -> None:
        if len(self.deleted) == self._lasts:
            raise StorageError("The storage is away.", code="unavailable")
        self._inner.delete(uri)
        self.deleted.append(uri.rsplit("/", 1)[-1])


def names(storage: Storage, output: str) -> set[str]:
    return {item.uri[len(output) + 1 :] for item in storage.list(output)}


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Plan, dict[str, Any]]:
    """A merge in several files, beside files of others."""
    storage = open_storage()
    output = str(tmp_path / "merged")
    if request.param == "s3":
        request.getfixturevalue("s3_env")
        output = f"s3://{request.getfixturevalue('bucket')}/team/merged"
    family = make_family(tmp_path / "models", num_experts=2, layers=2)
    plan = plan_merge(family, "linear", storage, output, max_shard_size=100_000)
    report = run_plan(plan, storage)
    for name in FOREIGN:
        storage.write_bytes(f"{output}/{name}", b"somebody else's")
    storage.write_bytes(f"{output}-2/{INDEX_NAME}", b"{}")  # an address that looks alike
    return plan, report


def test_everything_that_was_published_goes_and_nothing_else(
    published: tuple[Plan, dict[str, Any]],
) -> None:
    plan, report = published
    storage = Fragile(open_storage())
    assert len(plan.outputs) > 1
    before = names(storage, plan.output_uri)
    assert unpublish(plan, report, storage) == len(before) - len(FOREIGN)
    assert (storage.deleted[0], storage.deleted[-1]) == (INDEX_NAME, REPORT_NAME)
    assert names(storage, plan.output_uri) == set(FOREIGN)
    assert names(storage, f"{plan.output_uri}-2") == {INDEX_NAME}
    assert unpublish(plan, report, storage) == 0


@pytest.mark.parametrize("lasts", [1, 4])
def test_a_removal_that_broke_off_leaves_no_checkpoint_and_is_finished_later(
    published: tuple[Plan, dict[str, Any]], lasts: int
) -> None:
    plan, report = published
    with pytest.raises(StorageError, match="away"):
        unpublish(plan, report, Fragile(open_storage(), lasts))
    assert INDEX_NAME not in names(open_storage(), plan.output_uri)
    unpublish(plan, report, open_storage())
    assert names(open_storage(), plan.output_uri) == set(FOREIGN)


def other_report(data: bytes) -> bytes:
    report = json.loads(data)
    report["output"]["digest"] = "sha256:another"
    return json.dumps(report).encode()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (REPORT_NAME, other_report),
        (REPORT_NAME, lambda _: b"{}"),
        (REPORT_NAME, lambda _: b"not JSON"),
        (REPORT_NAME, None),
        (INDEX_NAME, lambda data: data.replace(b"model-00002", b"model-00001")),
        (INDEX_NAME, lambda data: data + b" "),
        ("model-00001", lambda data: data + b"more"),
    ],
    ids=[
        "other-digest",
        "no-digest",
        "no-report",
        "report-gone",
        "other-index",
        "longer-index",
        "other-weights",
    ],
)
def test_what_is_no_longer_this_merges_stays_whole(
    published: tuple[Plan, dict[str, Any]], name: str, change: Callable[[bytes], bytes] | None
) -> None:
    plan, report = published
    storage = Fragile(open_storage())
    uri = next(item.uri for item in storage.list(plan.output_uri) if f"/{name}" in item.uri)
    if change is None:
        open_storage().delete(uri)
    else:
        storage.write_bytes(uri, change(storage.read_bytes(uri, limit=1 << 30)))
    with pytest.raises(StorageError, match="no longer what the merge published") as caught:
        unpublish(plan, report, storage)
    assert caught.value.code == "output_changed"
    assert storage.deleted == []


def test_all_checkpoints_of_a_sweep_go_together(tmp_path: Path) -> None:
    storage = Fragile(open_storage())
    family = make_family(tmp_path / "models", num_experts=2)
    document = {
        **recipe(family, "task_arithmetic"),
        "sweep": [{"name": name, "parameters": {"lambda": n}} for n, name in enumerate("ab", 1)],
    }
    output = str(tmp_path / "sweep")
    plan = make_plan(parse_recipe(document), storage, MergeOptions(), output)
    report = run_plan(plan, storage)
    storage.deleted.clear()
    storage.write_bytes(f"{output}/c/{INDEX_NAME}", b"{}")
    shown = storage.read_bytes(f"{output}/b/{REPORT_NAME}", limit=1 << 30)
    storage.write_bytes(f"{output}/b/{REPORT_NAME}", other_report(shown))
    with pytest.raises(StorageError, match="/b is no longer"):
        unpublish(plan, report, storage)
    assert storage.deleted == []
    storage.write_bytes(f"{output}/b/{REPORT_NAME}", shown)
    unpublish(plan, report, storage)
    assert storage.deleted[:3] == [SWEEP_REPORT_NAME, INDEX_NAME, INDEX_NAME]
    assert names(storage, output) == {f"c/{INDEX_NAME}"}
    assert [path.name for path in Path(output).iterdir()] == ["c"]


def plan_sweep(folder: Path, storage: Storage) -> Plan:
    """Of two variants, each with a chat template and a folder of further ones."""
    family = make_family(folder / "models", num_experts=2)
    templates = family.base / "additional_chat_templates"
    templates.mkdir()
    (templates / "tools.jinja").write_text("{{ tools }}")
    document = {
        **recipe(family, "task_arithmetic"),
        "sweep": [{"name": name, "parameters": {"lambda": n}} for n, name in enumerate("ab", 1)],
    }
    return make_plan(parse_recipe(document), storage, MergeOptions(), str(folder / "root/out"))


def test_folders_that_are_empty_then_go_too(tmp_path: Path) -> None:
    storage = open_storage([str(tmp_path / "models"), str(tmp_path / "root")])
    plan = plan_sweep(tmp_path, storage)
    report = run_plan(plan, storage)
    templates = Path(plan.output_uri) / "b/additional_chat_templates"
    (templates / "mine.jinja").write_text("{{ mine }}")
    unpublish(plan, report, storage)
    left = {path.relative_to(tmp_path / "root") for path in (tmp_path / "root").rglob("*")}
    mine = templates.relative_to(tmp_path / "root") / "mine.jinja"
    assert left == {mine, *mine.parents} - {Path()}
    (templates / "mine.jinja").unlink()
    assert unpublish(plan, report, storage) == 0
    assert list((tmp_path / "root").iterdir()) == []


def test_a_storage_root_stays_although_it_is_empty(tmp_path: Path) -> None:
    root = tmp_path / "root"
    storage = open_storage([str(tmp_path / "models"), str(root / "out")])
    plan = plan_sweep(tmp_path, storage)
    unpublish(plan, run_plan(plan, storage), storage)
    assert list(root.rglob("*")) == [root / "out"]


@pytest.mark.parametrize("template", ["chatml", "{{ messages[0] }}"])
def test_a_chat_template_that_the_merge_wrote_goes_too(tmp_path: Path, template: str) -> None:
    storage = open_storage()
    family = make_family(tmp_path / "models", num_experts=2)
    document = recipe(family, "linear") | {"chat_template": template}
    output = str(tmp_path / "out")
    plan = make_plan(parse_recipe(document), storage, MergeOptions(), output)
    report = run_plan(plan, storage)
    assert "chat_template.jinja" in names(storage, output)
    unpublish(plan, report, storage)
    assert not Path(output).exists()
