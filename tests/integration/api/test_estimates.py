"""How long a merge should take, as plans tell it."""

from __future__ import annotations

from tests.support.api import RECIPE, LiveApi
from tests.support.rates import RATES


def test_a_plan_says_how_long_it_takes_once_workers_were_seen(api: LiveApi) -> None:
    body = {"recipe": RECIPE, "output_uri": "mem://out/estimate"}
    assert api.admin.post("/v1/plans", json=body).json()["estimate"] is None
    api.server.services.forecast.note_rates(RATES)
    api.server.services.forecast.note_slots(2)
    plan = api.admin.post("/v1/plans", json=body).json()
    assert plan["estimate"]["slots"] == 2
    assert plan["estimate"]["device"] == "cpu"
    assert plan["estimate"]["seconds"]["read"] >= plan["bytes_read"] / 1e6 > 0
    assert len(plan["estimate"]["shards"]) == plan["shards"]
