"""Which failures are worth another try, how many, and how long to wait before each."""

from __future__ import annotations

from dataclasses import dataclass

from merging.errors import MergeError

_LONGEST_WAIT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class RetryRule:
    """How a kind of failure is tried again.

    Attributes:
        tries: Of a shard (or of planning, or publishing), relative to the setting ``max_tries``.
        wait: Before the first retry, relative to ``retry_seconds``; it doubles with each.
    """

    tries: float = 1.0
    wait: float = 1.0


RULES = {
    # Nobody's fault: machines are taken away, clusters restart.
    "worker_lost": RetryRule(),
    # The job goes on, so somebody else stopped the worker.
    "cancelled": RetryRule(),
    # The machine was crowded. What is too large in itself stays so: little patience.
    "out_of_memory": RetryRule(tries=0.5, wait=4.0),
    # Storage retried for seconds already; it recovers when it is left alone, and it does recover.
    "throttled": RetryRule(tries=2.0, wait=4.0),
    "unavailable": RetryRule(tries=2.0, wait=2.0),
}
"""By code of the error. Whatever else calls itself retryable gets the plain rule; anything that
does not (a missing tensor, a changed source, a full disk) fails the job at once."""

_RETRIED_ANYWAY = frozenset({"cancelled"})


def is_worth_retrying(error: MergeError) -> bool:
    """Whether another try may go better."""
    return error.retryable or error.code in _RETRIED_ANYWAY


def wait_before_retry(
    code: str, failures: int, *, max_tries: int, retry_seconds: float
) -> float | None:
    """Seconds until the next try of something worth it; None if there have been enough.

    Args:
        code: Of the error in which the last try ended.
        failures: Tries that failed in this way so far, this one included.
        max_tries: See :class:`service.runner.settings.RunnerSettings`.
        retry_seconds: Likewise.
    """
    rule = RULES.get(code, RetryRule())
    if failures >= max(round(max_tries * rule.tries), 1):
        return None
    return backoff(failures - 1, retry_seconds * rule.wait)


def backoff(failures: int, first_seconds: float) -> float:
    """A wait that doubles with each failure, up to a minute."""
    return min(first_seconds * 2.0 ** min(failures, 32), _LONGEST_WAIT_SECONDS)
