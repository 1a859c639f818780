"""Sending spans without waiting for a collector that does not answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from workers import tracing as module
from workers.tracing import Tracing


class Gate(SpanExporter):
    """A collector that answers while its gate is open."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.calls = 0
        self.sent: list[str] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.calls += 1
        self.open.wait()
        self.sent += [span.name for span in spans]
        return SpanExportResult.SUCCESS


@pytest.fixture
def gate() -> Iterator[Gate]:
    exporter = Gate()
    yield exporter
    exporter.open.set()


@pytest.fixture
def tracing(gate: Gate) -> Iterator[Tracing]:
    made = Tracing(gate, "0")
    yield made
    gate.open.set()
    made.close()


def make_span(tracing: Tracing, name: str) -> None:
    tracing.begin(name, None, {}).end()


def test_what_is_flushed_has_been_sent(tracing: Tracing, gate: Gate) -> None:
    gate.open.set()
    for name in ("one", "two"):
        make_span(tracing, name)
        tracing.flush()
        assert gate.sent[-1] == name


def test_a_collector_that_hangs_is_asked_once_and_then_left_alone(
    tracing: Tracing, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SECONDS_TO_SEND", 0.01)
    for name in ("one", "two", "three"):
        make_span(tracing, name)
        tracing.flush()
    senders = [thread for thread in threading.enumerate() if thread.name == "spans"]
    assert (len(senders), gate.calls, gate.sent) == (1, 1, [])
    gate.open.set()
    senders[0].join()
    tracing.flush()
    tracing.close()
    assert gate.sent == ["one", "two", "three"]
