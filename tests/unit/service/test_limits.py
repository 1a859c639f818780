from __future__ import annotations

from contextlib import suppress

import pytest

from service import limits
from service.limits import FailedLogins, RateLimit, StreamSlots
from service.problems import RequestError, problem_from_error, problem_response


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def admitted(rate: RateLimit, token: str, tries: int) -> int:
    count = 0
    for _ in range(tries):
        with suppress(RequestError):
            rate.admit(token)
            count += 1
    return count


def test_a_token_has_two_seconds_in_reserve_and_then_its_rate() -> None:
    clock = Clock()
    rate = RateLimit(10, clock)
    assert admitted(rate, "a", 50) == 20
    clock.now += 0.5
    assert admitted(rate, "a", 50) == 5
    clock.now += 1000
    assert admitted(rate, "a", 50) == 20


def test_tokens_do_not_share_their_rate() -> None:
    rate = RateLimit(10, Clock())
    assert admitted(rate, "a", 30) == 20
    assert admitted(rate, "b", 30) == 20


def test_less_than_one_request_a_second_is_possible() -> None:
    clock = Clock()
    rate = RateLimit(0.1, clock)
    assert admitted(rate, "a", 3) == 1
    clock.now += 10
    assert admitted(rate, "a", 3) == 1


def test_tokens_with_a_full_reserve_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.limits._MANY_TOKENS", 10)
    clock = Clock()
    rate = RateLimit(10, clock)
    for number in range(50):
        rate.admit(str(number))
        clock.now += 1
    assert len(rate._full_at) <= 11


def test_a_slot_is_free_again_when_its_stream_ends() -> None:
    slots = StreamSlots(1)
    for _ in range(2):
        with slots.hold("a"), slots.hold("b"), pytest.raises(RequestError), slots.hold("a"):
            raise AssertionError
    assert not slots._open


def test_a_refusal_says_when_to_come_again() -> None:
    rate = RateLimit(1, Clock())
    assert admitted(rate, "a", 5) == 2
    with pytest.raises(RequestError) as caught:
        rate.admit("a")
    assert (caught.value.code, caught.value.retryable) == ("rate_limited", True)
    answer = problem_response(problem_from_error(caught.value))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")


def failures(logins: FailedLogins, address: str, tries: int = 50) -> int:
    """How many of so many bad tries were looked at."""
    count = 0
    for number in range(tries):
        with suppress(RequestError):
            logins.check(address, f"Bearer {number}")
            logins.note_failure(address)
            count += 1
    return count


def test_an_address_may_fail_as_often_as_a_minute_gives_and_then_at_its_rate() -> None:
    clock = Clock()
    logins = FailedLogins(10, clock)
    assert failures(logins, "10.0.0.1") == 10
    assert failures(logins, "10.0.0.2") == 10
    clock.now += 12
    assert failures(logins, "10.0.0.1") == 2
    clock.now += 600
    assert failures(logins, "10.0.0.1") == 10
    assert failures(FailedLogins(0.1, clock), "10.0.0.1") == 1


def test_whoever_shares_an_address_with_a_guesser_goes_on_with_what_was_good() -> None:
    logins = FailedLogins(5, Clock())
    logins.note_success("Bearer good")
    failures(logins, "10.0.0.1")
    logins.check("10.0.0.1", "Bearer good")
    with pytest.raises(RequestError) as caught:
        logins.check("10.0.0.1", "Bearer other")
    response = problem_response(problem_from_error(caught.value))
    assert response.status_code == 429
    assert response.headers["retry-after"] == "60"


def test_memory_does_not_grow_with_addresses_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_MOST_ADDRESSES", 3)
    logins = FailedLogins(1, Clock())
    for number in range(10):
        logins.note_failure(f"10.0.0.{number}")
        logins.note_success(f"Bearer {number}")
    assert [failures(logins, f"10.0.0.{number}", 1) for number in (9, 8, 7)] == [0, 0, 0]
    assert failures(logins, "10.0.0.1", 1) == 1
    assert len(logins._full_at) == len(logins._good) == 3
