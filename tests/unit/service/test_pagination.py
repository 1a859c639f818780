from __future__ import annotations

import string
from base64 import urlsafe_b64encode
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.pagination import decode_cursor, encode_cursor
from service.jobs.records import JobCursor, JobFilter
from service.jobs.states import JobState
from service.problems import RequestError

FILTER = JobFilter(
    states=(JobState.QUEUED, JobState.FAILED),
    labels={"team": "büro/ä"},
    method="wudi",
    created_after=datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
)


PLACE = JobCursor(datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC), "job_1")
GOOD = encode_cursor(PLACE, FILTER)


def test_a_cursor_gives_back_the_place_to_the_microsecond_and_the_filters() -> None:
    assert decode_cursor(GOOD, JobFilter) == (PLACE, FILTER)


def test_a_cursor_can_stand_in_an_address() -> None:
    assert set(GOOD) <= {*string.ascii_letters, *string.digits, "-", "_"}


def test_a_cursor_that_was_changed_anywhere_is_refused() -> None:
    good = GOOD
    for place in range(len(good) - 1):
        other = "A" if good[place] != "A" else "B"
        with pytest.raises(RequestError) as caught:
            decode_cursor(good[:place] + other + good[place + 1 :], JobFilter)
        assert caught.value.code == "bad_cursor"


@pytest.mark.parametrize("text", ["", "A", "é", "=", "\x00", "A" * 10_000, GOOD[:-4]])
def test_what_is_no_cursor_is_refused(text: str) -> None:
    with pytest.raises(RequestError):
        decode_cursor(text, JobFilter)


@given(st.text(max_size=200))
def test_no_text_does_anything_but_being_refused(text: str) -> None:
    with pytest.raises(RequestError):
        decode_cursor(text, JobFilter)


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_being_refused(data: bytes) -> None:
    with pytest.raises(RequestError):
        decode_cursor(urlsafe_b64encode(data).decode().rstrip("="), JobFilter)
