"""Rates of machines: what they say of sizes, how they are kept and learned."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest

from merging.rates import RateBook, Transfer, storage_kind
from tests.support.rates import RATES, rates

MB = 10**6


def test_the_rate_of_a_size_lies_between_those_measured() -> None:
    found = rates(steps=((64, 1e9), (256, 4e9), (1024, 8e9)))
    assert found.flops_per_second(64, 64) == pytest.approx(1e9)
    assert found.flops_per_second(128, 128) == pytest.approx(2e9)
    assert found.flops_per_second(256, 256) == pytest.approx(4e9)
    assert 4e9 < found.flops_per_second(300, 700) < 8e9


def test_sizes_beyond_those_measured_have_the_rate_of_the_nearest() -> None:
    found = rates(steps=((64, 1e9), (256, 4e9)))
    assert found.flops_per_second(0, 0) == found.flops_per_second(1, 1) == pytest.approx(1e9)
    assert found.flops_per_second(10**5, 10**5) == pytest.approx(4e9)


def test_a_matrix_counts_as_the_square_one_with_as_many_operations() -> None:
    found = rates(steps=((64, 1e9), (1024, 9e9)))
    assert found.flops_per_second(512, 64) == pytest.approx(found.flops_per_second(128, 128))


@pytest.mark.parametrize(
    ("uri", "kind"),
    [("s3://bucket/key", "s3"), ("/data/model", "file"), ("file:///data", "file")],
)
def test_kinds_of_storage(uri: str, kind: str) -> None:
    assert storage_kind(uri) == kind


def test_a_kind_of_storage_is_learned_from_its_first_use() -> None:
    known = rates(read={}, written={})
    learned = known.learn({"s3": Transfer(100 * MB, 2.0)}, {"file": Transfer(30 * MB, 3.0)})
    assert learned.read == {"s3": 50 * MB}
    assert learned.written == {"file": 10 * MB}


def test_one_odd_shard_moves_a_known_rate_by_half_on_a_scale_of_powers() -> None:
    known = rates(read={"s3": 100.0 * MB, "file": 1.0})
    assert known.learn({"s3": Transfer(100 * MB, 100.0)}, {}).read == {"s3": 10 * MB, "file": 1.0}


@pytest.mark.parametrize("transfer", [Transfer(1000, 0.5), Transfer(100 * MB, 0.0)])
def test_what_says_nothing_of_speed_is_not_learned_from(transfer: Transfer) -> None:
    assert RATES.learn({"s3": transfer}, {"s3": transfer}) == RATES


def test_a_book_keeps_the_last_rates_of_each_device(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rates.json"
    book = RateBook(path)
    assert book.find() is None
    book.note(RATES)
    book.note(rates(device="cuda:0 NVIDIA H100"))
    book.note(rates(operations=2e9))
    again = RateBook(path)
    for each in (book, again):
        assert each.find() == each.find(device="cpu") == rates(operations=2e9)
        assert each.find(device="cuda") == rates(device="cuda:0 NVIDIA H100")
        assert each.find(machine="elsewhere") is None
        assert each.find(threads=2) is None
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [item.name for item in path.parent.iterdir()] == ["rates.json"]


def test_books_of_several_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    first, second = RateBook(path), RateBook(path)
    first.note(RATES)
    second.note(rates(device="cuda:0 x"))
    assert second.find(device="cpu") == RATES
    assert RateBook(path).find(device="cpu") == RATES


def test_threads_may_note_at_the_same_time(tmp_path: Path) -> None:
    book = RateBook(tmp_path / "rates.json")
    threads = [threading.Thread(target=book.note, args=(rates(machine=str(n)),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(RateBook(tmp_path / "rates.json").find(machine=str(n)) for n in range(8))


def test_a_book_forgets_what_was_noted_long_ago(tmp_path: Path) -> None:
    book = RateBook(tmp_path / "rates.json")
    for number in range(40):
        book.note(rates(machine=str(number)))
    assert book.find(machine="0") is None
    assert book.find(machine="39") is not None


@pytest.mark.parametrize("content", [b"", b"{", b'[{"machine": 1}]', b"\xff"])
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rates.json"
    path.write_bytes(content)
    book = RateBook(path)
    assert book.find() is None
    book.note(RATES)
    assert RateBook(path).find() == RATES


def test_a_file_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    book = RateBook(tmp_path / "file" / "rates.json")
    book.note(RATES)
    assert book.find() == RATES


def test_without_a_file_rates_are_kept_in_memory() -> None:
    book = RateBook(None)
    book.note(RATES)
    assert book.find() == RATES
