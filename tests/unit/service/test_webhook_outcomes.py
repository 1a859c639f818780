"""What follows from a receiver's answer."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from service.jobs.outbox import Announcement, DeliveryState
from service.webhooks.delivery import RETRY_SECONDS, Reply, judge, parse_retry_after
from tests.unit.service.test_webhook_messages import delivery

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_only_2xx_is_success(status: int) -> None:
    outcome = judge(Reply(status=status, body="ok"), delivery(), NOW)
    assert outcome.state == DeliveryState.DELIVERED
    assert (outcome.response_status, outcome.response_body) == (status, "ok")
    assert outcome.error is None


@pytest.mark.parametrize("status", [101, 301, 302, 307, 400, 401, 404, 429, 500, 503])
def test_everything_else_is_tried_again(status: int) -> None:
    outcome = judge(Reply(status=status), delivery(), NOW)
    assert outcome.state == DeliveryState.PENDING
    assert outcome.error is not None
    assert str(status) in outcome.error
    assert not outcome.disable


def test_the_schedule_is_kept_with_some_jitter_and_then_ends() -> None:
    assert len(RETRY_SECONDS) == 9
    for tries, seconds in enumerate(RETRY_SECONDS, 1):
        outcome = judge(Reply(error="refused"), delivery(attempts=tries), NOW)
        assert outcome.retry_in is not None
        wait = outcome.retry_in.total_seconds()
        assert seconds <= wait <= 1.1 * seconds
    last = judge(Reply(error="refused"), delivery(attempts=10), NOW)
    assert (last.state, last.retry_in) == (DeliveryState.FAILED, None)
    assert last.flag is not None
    assert "10 tries" in last.flag
    assert "refused" in last.flag
    assert not last.disable


def test_gone_disables_at_once() -> None:
    outcome = judge(Reply(status=410), delivery(), NOW)
    assert (outcome.state, outcome.disable) == (DeliveryState.FAILED, True)
    assert outcome.flag is not None


@pytest.mark.parametrize("status", [429, 502, 504])
def test_an_overloaded_receiver_is_left_alone_for_a_while(status: int) -> None:
    outcome = judge(Reply(status=status), delivery(), NOW)
    assert outcome.pause_for == timedelta(seconds=60)
    assert outcome.retry_in == outcome.pause_for


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_obeyed(status: int) -> None:
    outcome = judge(Reply(status=status, retry_after="120"), delivery(), NOW)
    assert outcome.pause_for == outcome.retry_in == timedelta(seconds=120)
    later = judge(Reply(status=status, retry_after="120"), delivery(attempts=3), NOW)
    assert later.retry_in is not None
    assert later.retry_in >= timedelta(seconds=RETRY_SECONDS[2])


def test_a_test_is_tried_once_and_flags_nothing() -> None:
    outcome = judge(Reply(status=500), delivery(type=Announcement.ENDPOINT_TEST), NOW)
    assert (outcome.state, outcome.flag) == (DeliveryState.FAILED, None)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None),
        ("soon", None),
        ("-5", None),
        ("", None),
        ("0", 0),
        ("120", 120),
        (" 7 ", 7),
        ("9" * 40, 86_400),
        ("Sun, 01 Mar 2026 12:02:00 GMT", 120),
        ("Sun, 01 Mar 2026 11:00:00 GMT", 0),
        ("Sun, 01 Mar 2099 12:00:00 GMT", 86_400),
        ("Sun, 99 Mar 2026 12:00:00 GMT", None),
    ],
)
def test_retry_after_is_read_in_both_forms(text: str | None, seconds: int | None) -> None:
    expected = None if seconds is None else timedelta(seconds=seconds)
    assert parse_retry_after(text, NOW) == expected
