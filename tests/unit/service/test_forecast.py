"""What the controller says of time, from what workers told it."""

from __future__ import annotations

from pathlib import Path

import pytest

from merging.rates import Rates
from service.forecast import Forecast
from tests.support.jobs import tiny_plan
from tests.support.rates import RATES, rates

GPU = rates(device="cuda:0 NVIDIA H100", read={"file": 1e9})


def test_nothing_is_said_before_a_worker_was_seen() -> None:
    assert Forecast().estimate(tiny_plan()) is None


def test_the_rates_seen_last_are_used() -> None:
    forecast = Forecast()
    forecast.note_rates(None)
    for seen in (RATES, GPU):
        forecast.note_rates(seen)
        estimate = forecast.estimate(tiny_plan())
        assert estimate is not None
        assert estimate.device == seen.device


@pytest.mark.parametrize(("device", "expected"), [("cpu", RATES), ("cuda:1", GPU)])
def test_rates_of_other_devices_than_the_one_chosen_do_not_count(
    device: str, expected: Rates
) -> None:
    forecast = Forecast(device=device)
    other = GPU if expected is RATES else RATES
    forecast.note_rates(other)
    assert forecast.estimate(tiny_plan()) is None
    forecast.note_rates(expected)
    forecast.note_rates(other)
    estimate = forecast.estimate(tiny_plan())
    assert estimate is not None
    assert estimate.device == expected.device


def test_slots_are_those_that_the_pool_had_last() -> None:
    forecast = Forecast()
    forecast.note_rates(RATES)
    for count, expected in ((0, 1), (3, 3), (0, 3), (2, 2)):
        forecast.note_slots(count)
        estimate = forecast.estimate(tiny_plan())
        assert estimate is not None
        assert estimate.slots == expected


def test_rates_outlive_the_service(tmp_path: Path) -> None:
    Forecast(tmp_path / "rates.json").note_rates(RATES)
    assert Forecast(tmp_path / "rates.json").estimate(tiny_plan()) is not None
