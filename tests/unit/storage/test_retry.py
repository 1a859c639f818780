from __future__ import annotations

import pytest

from merging.errors import StorageError
from merging.storage.retry import RetryPolicy


class Attempts:
    """Fails with the given errors in turn, then returns ``"done"``."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.count = 0

    def __call__(self) -> str:
        self.count += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def _busy() -> StorageError:
    return StorageError("busy", code="throttled", retryable=True)


def _policy(waits: list[float], **changes: object) -> RetryPolicy:
    """A policy whose jitter is the bound itself and whose clock only takes notes."""
    return RetryPolicy(sleep=waits.append, jitter=lambda _, bound: bound, **changes)


def test_success_at_once_waits_for_nothing() -> None:
    waits: list[float] = []

    assert _policy(waits).run(Attempts()) == "done"
    assert waits == []


def test_waits_double_up_to_the_cap() -> None:
    waits: list[float] = []
    policy = _policy(waits, max_attempts=7, base_seconds=1.0, cap_seconds=10.0)

    assert policy.run(Attempts(*(_busy() for _ in range(6)))) == "done"
    assert waits == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_each_wait_is_drawn_between_zero_and_its_bound() -> None:
    bounds: list[tuple[float, float]] = []

    def draw(low: float, high: float) -> float:
        bounds.append((low, high))
        return 0.0

    RetryPolicy(sleep=lambda _: None, jitter=draw, base_seconds=0.5).run(Attempts(_busy(), _busy()))

    assert bounds == [(0.0, 0.5), (0.0, 1.0)]


def test_it_gives_up_after_the_last_attempt_and_says_how_many_there_were() -> None:
    attempts = Attempts(*(_busy() for _ in range(9)))
    waits: list[float] = []

    with pytest.raises(StorageError) as caught:
        _policy(waits, max_attempts=3).run(attempts)

    assert (attempts.count, len(waits)) == (3, 2)
    assert caught.value.context["attempts"] == 3


@pytest.mark.parametrize(
    "error", [StorageError("gone", code="not_found"), ZeroDivisionError("not ours")]
)
def test_what_is_not_retryable_is_raised_at_once(error: Exception) -> None:
    attempts = Attempts(error)

    with pytest.raises(type(error)) as caught:
        _policy([]).run(attempts)

    assert caught.value is error
    assert attempts.count == 1
