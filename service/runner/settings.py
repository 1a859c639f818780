"""What an operator can choose about the runner."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RunnerSettings:
    """Limits and intervals of a runner.

    Attributes:
        storage_roots: Prefixes that workers may read and write; empty allows everything.
        device: Torch device of shard tasks: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        max_concurrent_jobs: Jobs driven at once.
        max_in_flight_shards: Shards handed to the pool at once; None: its slots and a few more, so
            that no worker waits for its next shard.
        max_tries: How often a shard is tried, and planning and publishing, before the job fails;
            some failures have more or fewer (:mod:`service.runner.retry`).
        max_takeovers: Runners in a row that may die on a job without progress.
        lease_seconds: How long a silent runner keeps its jobs.
        heartbeat_seconds: Between renewals; also how soon a cancel is noticed.
        claim_seconds: Between looks for work.
        progress_seconds: Between ``job.progress`` events of a job.
        retry_seconds: Wait before the first retry; doubles with each, up to a minute. Likewise.
        grace_seconds: How long cancelled workers may take before they are ended.
    """

    storage_roots: tuple[str, ...] = ()
    device: str = "auto"
    max_concurrent_jobs: int = 4
    max_in_flight_shards: int | None = None
    max_tries: int = 4
    max_takeovers: int = 4
    lease_seconds: float = 30.0
    heartbeat_seconds: float = 2.0
    claim_seconds: float = 1.0
    progress_seconds: float = 1.0
    retry_seconds: float = 1.0
    grace_seconds: float = 30.0
