"""Spans of a try at a shard, where something is missing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.support.collector import Collector, collecting
from tests.support.stub_engine import ENGINE, make_task
from workers import shard_spans
from workers.messages import ShardDone, ShardFailed
from workers.shard_task import finish_task

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _fresh_process() -> Iterator[None]:
    shard_spans._tracing.cache_clear()
    yield
    shard_spans._tracing.cache_clear()


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as server:
        yield server


def run(tmp_path: Path, endpoint: str | None, **parameters: object) -> ShardDone | ShardFailed:
    task = make_task("job", 3, attempt=2, output=tmp_path, **parameters)
    task = msgspec.structs.replace(task, otlp_endpoint=endpoint)
    return finish_task(task, lambda _: None, lambda: False, engine=ENGINE)


def test_a_failure_says_what_was_done_and_no_secret(collector: Collector, tmp_path: Path) -> None:
    run(tmp_path, collector.endpoint, steps=2, fail="checkpoint")
    (span,) = collector.spans
    facts = span.attributes
    assert (facts["shard_index"], facts["attempt"], facts["error.type"]) == (3, 2, "missing_tensor")
    assert (facts["bytes_read"], facts["tensors_solved"], facts["tensors"]) == (4, 1, 2)
    assert span.is_error


def test_a_defect_keeps_its_details_to_the_log(collector: Collector, tmp_path: Path) -> None:
    run(tmp_path, collector.endpoint, fail="defect")
    (span,) = collector.spans
    assert span.attributes["error.type"] == "internal"
    assert "secret detail" not in str(span)


def test_layers_of_a_shard_are_a_range(collector: Collector, tmp_path: Path) -> None:
    run(tmp_path, collector.endpoint, steps=5)
    (span,) = collector.spans
    assert (span.attributes["first_layer"], span.attributes["last_layer"]) == (0, 4)


def test_a_worker_without_the_packages_merges_without_spans(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert isinstance(run(tmp_path, collector.endpoint), ShardDone)
    assert not collector.spans


def test_a_worker_whose_settings_for_it_are_wrong_merges_without_spans(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    assert isinstance(run(tmp_path, collector.endpoint), ShardDone)
    assert not collector.spans


def test_nothing_is_loaded_without_an_endpoint(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path;"
        "from tests.support.stub_engine import ENGINE, make_task;"
        "from workers.shard_task import finish_task;"
        "task = make_task('job', output=Path(sys.argv[1]));"
        "finish_task(task, print, lambda: False, engine=ENGINE);"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "ShardStarted" in done.stdout
    assert "opentelemetry" not in done.stdout
