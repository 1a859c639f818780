"""Counters of one controller, in a registry of its own."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from service.jobs.states import JobState


class Metrics:
    """What ``/metrics`` shows. No ids, addresses or user text in labels.

    Args:
        version: Of the server.
        commit: That it was built from.
    """

    def __init__(self, version: str, commit: str = "unknown") -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "mergeyard_http_requests",
            "Answered requests.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._durations = Histogram(
            "mergeyard_http_request_duration_seconds",
            "Time until a request was answered; event streams count until they end.",
            ["method", "route"],
            registry=self.registry,
        )
        self.jobs_submitted = Counter(
            "mergeyard_jobs_submitted",
            "Jobs submitted to this controller.",
            ["merge_method"],
            registry=self.registry,
        )
        self.jobs_finished = Counter(
            "mergeyard_jobs_finished",
            "Jobs that ended here: were run, or were cancelled while they waited.",
            ["merge_method", "outcome"],
            registry=self.registry,
        )
        self.webhook_deliveries = Counter(
            "mergeyard_webhook_deliveries",
            "Tries at delivering webhooks from this controller.",
            ["outcome"],
            registry=self.registry,
        )
        self._oldest_pending = Gauge(
            "mergeyard_outbox_oldest_pending_seconds",
            "How long the delivery that has waited longest for a sender has been due.",
            registry=self.registry,
        )
        self._jobs = Gauge(
            "mergeyard_jobs", "Jobs in the store by state.", ["state"], registry=self.registry
        )
        self._streams = Gauge(
            "mergeyard_event_streams_open", "Event streams being served.", registry=self.registry
        )
        build = Gauge(
            "mergeyard_build_info", "Always 1.", ["version", "commit"], registry=self.registry
        )
        build.labels(version, commit).set(1)

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """One request was answered; ``route`` is the template of its address."""
        known = method if method in _METHODS else "other"
        self._requests.labels(known, route, str(status)).inc()
        self._durations.labels(known, route).observe(seconds)

    def render(
        self, jobs: Mapping[JobState, int], open_streams: int, oldest_pending_seconds: float
    ) -> bytes:
        """The text format of Prometheus."""
        for state, count in jobs.items():
            self._jobs.labels(state.value).set(count)
        self._streams.set(open_streams)
        self._oldest_pending.set(oldest_pending_seconds)
        return generate_latest(self.registry)


_METHODS = frozenset({"GET", "POST", "PATCH", "PUT", "DELETE", "HEAD", "OPTIONS"})
