"""The states of a job, and the only steps between them.

::

    queued ──► planning ──► running ──► publishing ──► succeeded
      │           │            │            │
      │           └────────────┼────────────┤
      │                        ├──► failed ──► queued      (retry: the next attempt)
      └──► cancelled ◄── cancelling ──► succeeded          (the cancel came too late)

The same table is a CHECK constraint in the database (``tables.py``).
"""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    """Where a job is. The set is closed; finer detail is the job's phase."""

    QUEUED = "queued"  # waits for a runner; nobody holds a lease
    PLANNING = "planning"  # claimed: headers are read, the plan is made and stored
    RUNNING = "running"  # shards are merged
    PUBLISHING = "publishing"  # all shards are there: companions, report, index, verification
    SUCCEEDED = "succeeded"  # the output is complete and verified
    FAILED = "failed"  # `error` says why; a retry makes it queued again
    CANCELLING = "cancelling"  # somebody asked to stop; work in flight is being ended
    CANCELLED = "cancelled"  # stopped; there is no output


class ShardState(StrEnum):
    """Where a shard of a job is."""

    PENDING = "pending"  # not given to a worker, or given back after a fault worth retrying
    RUNNING = "running"  # a worker has taken it up
    SUCCEEDED = "succeeded"  # published, with a receipt
    FAILED = "failed"  # not worth retrying, or retried too often: the job fails


TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.PLANNING, JobState.CANCELLED}),
    JobState.PLANNING: frozenset({JobState.RUNNING, JobState.FAILED, JobState.CANCELLING}),
    JobState.RUNNING: frozenset({JobState.PUBLISHING, JobState.FAILED, JobState.CANCELLING}),
    JobState.PUBLISHING: frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLING}),
    JobState.CANCELLING: frozenset({JobState.CANCELLED, JobState.SUCCEEDED}),
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.CANCELLED: frozenset(),
}
"""For each state, the states that may follow it."""

TERMINAL: frozenset[JobState] = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
"""States in which nothing of the job is in flight. Only ``failed`` can be left, by a retry."""


def is_allowed(old: JobState, new: JobState) -> bool:
    """Whether a job in ``old`` may go to ``new``."""
    return new in TRANSITIONS[old]
