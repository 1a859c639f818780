import json
import stat
from pathlib import Path

import pytest

from merging.errors import CheckpointError, PlanError, StorageError
from merging.execute.shard import run_shard
from merging.local_run import run_plan
from merging.publish import find_published, prepare_output, publish, read_report
from merging.storage.router import open_storage
from merging.verify import verify_output
from tests.support.checkpoints import make_family
from tests.support.merges import plan_merge, weight_bytes


class Journal:
    """The real storage, with the order of all changes noted."""

    def __init__(self, inner):
        self.inner = inner
        self.changes = []

    def __getattr__(self, name):
        call = getattr(self.inner, name)
        if name not in ("write_bytes", "copy", "delete", "open_writer"):
            return call

        def noted(*arguments, **options):
            target = arguments[1] if name == "copy" else arguments[0]
            self.changes.append((name, target.rsplit("/", 1)[-1]))
            return call(*arguments, **options)

        return noted


@pytest.fixture
def family(tmp_path):
    return make_family(tmp_path / "models", num_experts=2)


def test_the_index_is_written_last(family, tmp_path):
    storage = Journal(open_storage())
    run_plan(plan_merge(family, "linear", storage, tmp_path / "out"), storage)
    written = [name for change, name in storage.changes if change != "delete"]
    assert written[-1] == "model.safetensors.index.json"
    assert written[0] == "in-progress"


def test_the_output_holds_what_a_reader_expects_and_no_leftovers(family, tmp_path):
    storage = open_storage()
    report = run_plan(plan_merge(family, "linear", storage, tmp_path / "out"), storage)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merge_report.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert read_report(storage, str(tmp_path / "out")) == report


def test_file_modes_follow_the_umask(family, tmp_path):
    import os

    old = os.umask(0o027)
    try:
        storage = open_storage()
        run_plan(plan_merge(family, "linear", storage, tmp_path / "out"), storage)
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()}
    assert modes == {0o640}


def test_card_and_report_carry_lineage_and_recipe(family, tmp_path):
    storage = open_storage()
    report = run_plan(plan_merge(family, "ties", storage, tmp_path / "out"), storage)
    assert [item["role"] for item in report["inputs"]] == ["base", "expert", "expert"]
    assert report["bytes_read"] == sum(
        (path / "model.safetensors").stat().st_size for path in (family.base, *family.experts)
    ) - sum(header_bytes(path) for path in (family.base, *family.experts))
    assert len(report["tensors"]) == len(family.base_state)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "merge_method: ties" in card
    assert str(family.experts[1]) in card


def header_bytes(folder: Path) -> int:
    data = (folder / "model.safetensors").read_bytes()
    return 8 + int.from_bytes(data[:8], "little")


def test_an_output_that_holds_a_checkpoint_is_refused(family, tmp_path):
    storage = open_storage()
    plan = plan_merge(family, "linear", storage, tmp_path / "out")
    run_plan(plan, storage)
    with pytest.raises(PlanError, match="already holds a checkpoint") as caught:
        prepare_output(plan, storage)
    assert caught.value.code == "output_exists"


def test_overwriting_hides_the_old_checkpoint_first_and_sweeps_its_files(family, tmp_path):
    out = tmp_path / "out"
    storage = open_storage()
    run_plan(plan_merge(family, "linear", storage, out, max_shard_size="150kB"), storage)
    (out / "model.safetensors").write_bytes(b"an older single-file checkpoint")
    journal = Journal(open_storage())
    run_plan(plan_merge(family, "linear", journal, out, overwrite=True), journal)
    assert journal.changes[:2] == [
        ("delete", "model.safetensors"),
        ("delete", "model.safetensors.index.json"),
    ]
    assert list(weight_bytes(out)) == ["model-00001-of-00001.safetensors"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model-00001-of-00001.safetensors"}


def test_a_finished_merge_is_recognised_after_a_crash(family, tmp_path):
    storage = open_storage()
    plan = plan_merge(family, "linear", storage, tmp_path / "out")
    assert find_published(plan, storage) is None
    report = run_plan(plan, storage)
    assert find_published(plan, storage) == report
    other = plan_merge(family, "linear", storage, tmp_path / "out", seed=1, overwrite=True)
    assert find_published(other, storage) is None


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]"])
def test_what_stands_in_the_place_of_a_report_is_named(family, tmp_path, content):
    storage = open_storage()
    plan = plan_merge(family, "linear", storage, tmp_path / "out")
    run_plan(plan, storage)
    path = tmp_path / "out" / "merge_report.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a merge report") as caught:
        find_published(plan, storage)
    assert caught.value.code == "index_inconsistent"


def test_a_shard_that_somebody_changed_is_not_published(family, tmp_path):
    storage = open_storage()
    plan = plan_merge(family, "linear", storage, tmp_path / "out")
    receipt = run_shard(plan.work(0, plan.digest), storage)
    path = tmp_path / "out" / receipt.file_name
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        publish(plan, [receipt], storage)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_reading_back_finds_a_flipped_bit_that_storage_hides(family, tmp_path):
    import msgspec

    storage = open_storage()
    plan = plan_merge(family, "linear", storage, tmp_path / "out")
    receipt = run_shard(plan.work(0, plan.digest), storage)
    verify_output(plan, [receipt], storage, read_weights=True)
    path = tmp_path / "out" / receipt.file_name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    hidden = msgspec.structs.replace(receipt, version=storage.stat(str(path)).version)
    with pytest.raises(CheckpointError, match="reads back with SHA-256"):
        verify_output(plan, [hidden], storage, read_weights=True)


def test_a_missing_receipt_is_named(family, tmp_path):
    storage = open_storage()
    plan = plan_merge(family, "linear", storage, tmp_path / "out", max_shard_size="150kB")
    receipt = run_shard(plan.work(0, plan.digest), storage)
    with pytest.raises(CheckpointError, match=r"receipts for .*model-00001-of-00003"):
        publish(plan, [receipt], storage)


def test_what_cannot_be_swept_does_not_fail_a_complete_merge(family, tmp_path):
    class Stubborn(Journal):
        def delete(self, uri):
            raise StorageError(f"{uri} may not be deleted.", code="denied")

    storage = Stubborn(open_storage())
    plan = plan_merge(family, "linear", storage, tmp_path / "out")
    report = run_plan(plan, storage)
    assert (tmp_path / "out" / ".mergeyard").exists()
    assert find_published(plan, open_storage()) == report
    assert not (tmp_path / "out" / ".mergeyard").exists()
