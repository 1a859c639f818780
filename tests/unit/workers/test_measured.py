"""The engine that pools run: rates in receipts, learned from what was done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from merging.local_run import run_plan
from merging.plan.plan import Plan, ShardWork, SourceFile
from merging.rates import RateBook, Rates
from merging.receipts import Receipt
from merging.storage.router import open_storage
from tests.support.checkpoints import make_family
from tests.support.merges import plan_merge, weight_bytes
from tests.support.rates import RATES, rates
from tests.support.stub_engine import make_receipt, make_task
from workers import measured, shard_task


@pytest.fixture
def measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What was measured; a machine of this test alone."""
    calls: list[Any] = []

    def measure(device: str, name: str, threads: int, folder: Path) -> Rates:
        calls.append((device, name, threads, folder))
        return rates(device=name, threads=threads)

    monkeypatch.setattr("workers.measured.measure_rates", measure)
    monkeypatch.setattr("platform.node", lambda: RATES.machine)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured._machine.cache_clear()
    yield calls
    measured._machine.cache_clear()


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    family = make_family(tmp_path / "models", num_experts=2)
    return plan_merge(family, "linear", open_storage(), tmp_path / "out", max_shard_size="150kB")


def run(plan: Plan, index: int = 0) -> Receipt:
    return measured.run_shard(plan.work(index, plan.digest), open_storage())


def test_pools_run_it(measurements: list[Any]) -> None:
    assert shard_task.ENGINE == "workers.measured:run_shard"


def test_a_machine_is_measured_once(plan: Plan, measurements: list[Any], tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "mergeyard"
    receipts = [run(plan, index) for index in (0, 1)]
    measured._machine.cache_clear()  # another process
    receipts.append(run(plan, 2))
    assert measurements == [("cpu", "cpu", 1, folder)]
    assert [receipt.rates and receipt.rates.steps for receipt in receipts] == 3 * [RATES.steps]
    assert receipts[0].rates == RATES, "what was known before the shard"


def test_another_number_of_threads_is_measured_by_itself(
    plan: Plan, measurements: list[Any]
) -> None:
    run(plan)
    run(msgspec.structs.replace(plan, threads=2), 1)
    assert [threads for _, _, threads, _ in measurements] == [1, 2]


def work(*uris: str, output: str = "/out") -> ShardWork:
    files = tuple(SourceFile(uri, 1, "v") for uri in uris)
    made = make_task("job", output=Path("/")).work
    return msgspec.structs.replace(made, files=files, output_uri=output)


def receipt(**fields: Any) -> Receipt:
    return msgspec.structs.replace(make_receipt(work()), **fields)


BUSY = {"bytes_read": 10**8, "size": 10**8, "busy_seconds": {"read": 1.0, "write": 2.0}}


def test_speeds_of_storage_are_learned_by_kind() -> None:
    known = rates(read={}, written={})
    learned = measured.learn(known, work("s3://a/b", "s3://c/d"), receipt(**BUSY))
    assert (learned.read, learned.written) == ({"s3": 1e8}, {"file": 5e7})


def test_reading_from_several_kinds_at_once_teaches_nothing() -> None:
    known = rates(read={}, written={})
    learned = measured.learn(known, work("s3://a/b", "/c/d"), receipt(**BUSY))
    assert (learned.read, learned.written) == ({}, {"file": 5e7})


def test_receipts_of_earlier_versions_teach_nothing() -> None:
    old = receipt(bytes_read=10**8, size=10**8)
    assert measured.learn(RATES, work("/a/b"), old) == RATES


def test_what_was_learned_is_kept_for_the_next_shard(
    plan: Plan, measurements: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merging.rates._LEARN_BYTES", 1)
    first, second = run(plan, 0), run(plan, 1)
    assert first.rates is not None
    assert second.rates is not None
    assert second.rates.read["file"] > first.rates.read["file"] == RATES.read["file"]
    kept = RateBook(tmp_path / "cache" / "mergeyard" / "rates.json").find(device="cpu")
    assert kept is not None
    assert kept.written["file"] > RATES.written["file"]


def test_a_merge_in_one_process_may_be_measured_too_and_has_the_same_bytes(
    plan: Plan, measurements: list[Any], tmp_path: Path
) -> None:
    storage = open_storage()
    report = run_plan(plan, storage, engine=measured.run_shard)
    assert report["estimate"]["total"] > 0
    plain = msgspec.structs.replace(plan, output_uri=str(tmp_path / "plain"))
    assert run_plan(plain, storage)["estimate"] is None
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "plain")
