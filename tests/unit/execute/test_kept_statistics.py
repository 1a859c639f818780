"""Statistics that one merge keeps for others: taken over where they are whole, else made anew."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from merging.errors import MergeError, StorageError
from merging.execute.skeleton import Skeleton
from merging.execute.statistics import run_statistics
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.plan import Plan, file_uri
from merging.plan.planner import make_plan
from merging.publish import read_report
from merging.receipts import Receipt
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.calibrated import calibrated_recipe, run_shards, statistics_shards, write_models
from tests.support.merges import weight_bytes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_models(tmp_path_factory.mktemp("models"), "llama", 2)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Blocks of models that are run."""
    seen: list[str] = []
    build = Skeleton.__init__

    def count(skeleton: Skeleton, work: Any, device: str) -> None:
        seen.append(f"{work.uri} {work.block}")
        build(skeleton, work, device)

    monkeypatch.setattr(Skeleton, "__init__", count)
    return seen


class Place:
    """A folder for outputs, and one in which statistics are kept."""

    def __init__(self, folder: Path, models: list[Path]) -> None:
        self.kept = folder / "kept"
        self._folder = folder
        self._models = models

    def plan(self, name: str, method: str = "lot", **calibration: Any) -> Plan:
        document = calibrated_recipe(self._models, method, **calibration)
        options = MergeOptions(statistics_uri=str(self.kept))
        return make_plan(parse_recipe(document), open_storage(), options, str(self._folder / name))

    def merge(self, name: str, method: str = "lot", **calibration: Any) -> dict[int, Receipt]:
        """Run a plan; receipts of the statistics."""
        plan, receipts = self.plan(name, method, **calibration), {}

        def engine(*args: Any, **kwargs: Any) -> Receipt:
            from merging.execute.shard import run_shard

            receipt = run_shard(*args, **kwargs)
            receipts[receipt.shard_index] = receipt
            return receipt

        run_plan(plan, open_storage(), engine=engine)
        return {shard.index: receipts[shard.index] for shard in statistics_shards(plan)}

    def bytes(self, name: str) -> dict[str, bytes]:
        return weight_bytes(self._folder / name)

    def report(self, name: str) -> dict[str, Any]:
        return read_report(open_storage(), str(self._folder / name))

    def experts(self) -> list[dict[str, Any]]:
        """As the report of the first merge has them."""
        return [item for item in self.report("first")["inputs"] if item["role"] == "expert"]

    def alone(self, name: str, **calibration: Any) -> dict[str, bytes]:
        """What the merge makes without anything kept."""
        document = calibrated_recipe(self._models, **calibration)
        output = self._folder / name
        plan = make_plan(parse_recipe(document), open_storage(), MergeOptions(), str(output))
        run_plan(plan, open_storage())
        return weight_bytes(output)


@pytest.fixture
def place(tmp_path: Path, models: list[Path]) -> Place:
    return Place(tmp_path, models)


def test_a_second_merge_reads_no_expert_and_runs_none(place: Place, forwards: list[str]) -> None:
    first = place.merge("first")
    assert len(forwards) == len(first) == 2 * 4
    assert not any(receipt.reused for receipt in first.values())
    forwards.clear()
    second = place.merge("second")
    assert forwards == []
    for index, receipt in second.items():
        assert receipt.reused
        assert receipt.bytes_read == receipt.size == first[index].size
        assert receipt.bytes_written == 0
        assert receipt.sha256 == first[index].sha256
        assert receipt.problems == first[index].problems
    assert place.bytes("second") == place.bytes("first") == place.alone("alone")
    told = [place.report(name)["statistics"] for name in ("first", "second")]
    assert [[(one["blocks"], one["reused"]) for one in own] for own in told] == [
        [(4, 0)] * 2,
        [(4, 4)] * 2,
    ]
    assert {one["samples"] for own in told for one in own} == {5}
    assert {one["tokens"] for own in told for one in own} == {29}
    assert [one["model"] for one in told[0]] == [item["uri"] for item in place.experts()]


def test_another_method_takes_over_the_same(place: Place, forwards: list[str]) -> None:
    place.merge("lot", "lot")
    forwards.clear()
    assert all(receipt.reused for receipt in place.merge("regmean", "regmean").values())
    assert forwards == []


@pytest.mark.parametrize(
    ("change", "blocks"),
    [({"data": [[1, 2, 3]]}, 8), ({"batch": 3}, 8), ({"max_length": 30}, 8), ({"samples": 99}, 0)],
)
def test_what_follows_from_something_else_is_measured(
    place: Place, forwards: list[str], change: dict[str, Any], blocks: int
) -> None:
    place.merge("first")
    forwards.clear()
    place.merge("second", **change)
    assert len(forwards) == blocks


def test_an_expert_that_was_written_anew_is_measured_again(
    tmp_path: Path, forwards: list[str]
) -> None:
    models = write_models(tmp_path / "models", "llama", 2)
    place = Place(tmp_path, models)
    place.merge("first")
    forwards.clear()
    [weights] = models[1].glob("*.safetensors")
    weights.write_bytes(weights.read_bytes())
    place.merge("second")
    assert {call.split()[0] for call in forwards} == {str(models[1])}


def test_a_damaged_file_is_measured_anew_and_replaced(place: Place, forwards: list[str]) -> None:
    place.merge("first")
    forwards.clear()
    chosen = sorted(place.kept.glob("*.safetensors"))[3]
    whole = chosen.read_bytes()
    chosen.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    receipts = place.merge("second")
    assert len(forwards) == 1
    assert [r.file_name for r in receipts.values() if not r.reused] == [chosen.name]
    assert chosen.read_bytes() == whole
    assert place.bytes("second") == place.bytes("first")


@pytest.mark.parametrize("record", ["", "{}", None])
def test_a_file_without_its_record_is_as_good_as_none(
    place: Place, forwards: list[str], record: str | None
) -> None:
    place.merge("first")
    forwards.clear()
    beside = min(place.kept.glob("*.json"))
    if record is None:
        beside.unlink()
    else:
        beside.write_text(record)
    place.merge("second")
    assert len(forwards) == 1


def test_a_chain_that_stopped_is_continued_by_another_merge(
    place: Place, forwards: list[str]
) -> None:
    plan = place.plan("stopped")
    run_shards(plan, open_storage(), plan.shards[:2], {})
    forwards.clear()
    place.merge("other")
    assert [int(call.split()[1]) for call in forwards] == [1, 2, -1, 0, 1, 2]
    assert place.bytes("other") == place.alone("alone")


def test_an_expert_that_is_named_twice_is_run_once(
    tmp_path: Path, models: list[Path], forwards: list[str]
) -> None:
    document = calibrated_recipe([*models, models[1]])
    for name, options in (("a", {}), ("b", {"statistics_uri": str(tmp_path / "kept")})):
        forwards.clear()
        output = str(tmp_path / name)
        plan = make_plan(parse_recipe(document), open_storage(), MergeOptions(**options), output)
        run_plan(plan, open_storage())
        assert len(forwards) == len(statistics_shards(plan)) == 2 * 4
    assert weight_bytes(tmp_path / "a") == weight_bytes(tmp_path / "b")


def test_merges_that_measure_the_same_at_once_harm_neither(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found nothing when they begin with a block, and both finish."""
    both = threading.Barrier(2)
    measure = run_statistics.__globals__["_Measuring"]._measure
    waits = {"first", "second"}

    def together(run: Any) -> Any:
        results = measure(run)
        if threading.current_thread().name in waits:
            waits.discard(threading.current_thread().name)
            both.wait(60)
        return results

    monkeypatch.setattr(run_statistics.__globals__["_Measuring"], "_measure", together)
    failures: list[BaseException] = []

    def merge(name: str) -> None:
        plan = place.plan(name)
        for _ in range(12):
            try:
                run_plan(plan, open_storage())
            except StorageError as error:  # replaced by the other one; a service tries again
                if error.code != "source_changed":
                    failures.append(error)
            except BaseException as error:
                failures.append(error)
                raise
            else:
                return

    threads = [threading.Thread(target=merge, args=(n,), name=n) for n in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert not failures
    assert place.bytes("first") == place.bytes("second") == place.alone("alone")


def test_what_is_kept_lies_in_its_folder_alone(place: Place) -> None:
    plan = place.plan("first")
    place.merge("first")
    files = {Path(file_uri(plan.output_uri, plan.digest, s)) for s in statistics_shards(plan)}
    assert {file.parent for file in files} == {place.kept}
    names = {file.name for file in place.kept.iterdir()}
    assert names == {file.name for file in files} | {f"{file.name}.json" for file in files}


def refusal(document: dict[str, Any], output: Path, kept: Path, *roots: Path) -> MergeError:
    """What is wrong with a folder for statistics."""
    storage, options = open_storage(list(map(str, roots))), MergeOptions(statistics_uri=str(kept))
    with pytest.raises(MergeError) as raised:
        make_plan(parse_recipe(document), storage, options, str(output))
    assert [fault.pointer for fault in raised.value.faults] == ["/options/statistics_uri"]
    return raised.value


def test_a_folder_outside_of_the_roots_is_refused(tmp_path: Path, models: list[Path]) -> None:
    roots = (models[0].parent, tmp_path / "out")
    document = calibrated_recipe(models)
    error = refusal(document, tmp_path / "out/merged", tmp_path / "kept", *roots)
    assert error.code == "uri_not_allowed"


def test_a_place_that_is_no_folder_of_its_own_is_refused(
    tmp_path: Path, models: list[Path]
) -> None:
    output, document = tmp_path / "out", calibrated_recipe(models)
    (tmp_path / "file").write_text("")
    for kept, reason in (
        (tmp_path / "file", "is a file"),
        (output, "reads or writes"),
        (output / "kept", "reads or writes"),
        (models[0], "reads or writes"),
        (models[1] / "kept", "reads or writes"),
    ):
        assert reason in refusal(document, output, kept).detail


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, models: list[Path]) -> None:
    kept = tmp_path / "kept"
    kept.symlink_to(kept)
    error = refusal(calibrated_recipe(models), tmp_path / "out", kept)
    assert error.code == "denied"


@pytest.mark.parametrize(
    ("method", "reason"),
    [("task_arithmetic", "looks at no samples"), ("regmean_plus_plus", "merged blocks")],
)
def test_methods_without_statistics_to_keep_are_refused(
    method: str, reason: str, tmp_path: Path, models: list[Path]
) -> None:
    document = calibrated_recipe(models, method)
    if method == "task_arithmetic":
        del document["calibration"]
    error = refusal(document, tmp_path / "out", tmp_path / "kept")
    assert reason in error.detail
    last = {**document, "models": [{"model": "x"}, *document["models"]]}
    both = {"documents": [{**document, "name": "x"}, last]}
    assert reason in refusal(both, tmp_path / "out", tmp_path / "kept").detail


def test_of_several_documents_those_with_statistics_keep_them(
    tmp_path: Path, models: list[Path]
) -> None:
    kept = tmp_path / "kept"
    base, *experts = map(str, models)
    added = {"merge_method": "task_arithmetic", "base_model": base, "name": "sum"}
    added["models"] = [{"model": expert} for expert in experts]
    last = calibrated_recipe(models)
    last["models"][0] = {"model": "sum"}
    options = MergeOptions(statistics_uri=str(kept))
    recipe = parse_recipe({"documents": [added, last]})
    plan = make_plan(recipe, open_storage(), options, str(tmp_path / "out"))
    assert {shard.folder for shard in plan.shards} == {"", str(kept)}
    error = refusal({"documents": [added, last]}, tmp_path / "out", tmp_path / "out/kept")
    assert "reads or writes" in error.detail
