"""Webhook endpoints by way of the API."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from service.jobs.outbox import AttemptOutcome, DeliveryState
from service.jobs.states import JobState
from service.jobs.tables import outbox, webhook_endpoints
from tests.integration.api.test_problems import check_problem
from tests.support.api import LiveApi

PATH = "/v1/webhook-endpoints"


def create(api: LiveApi, **fields: Any) -> dict[str, Any]:
    response = api.admin.post(PATH, json={"url": "https://example.com/hook", **fields})
    assert response.status_code == 201, response.text
    assert response.headers["location"] == f"{PATH}/{response.json()['id']}"
    return response.json()


@pytest.fixture
def endpoint(api: LiveApi) -> Any:
    made = create(api)
    yield made
    assert api.admin.delete(f"{PATH}/{made['id']}").status_code in (204, 404)


def test_an_endpoint_shows_everything_but_its_secret(api: LiveApi, endpoint: Any) -> None:
    secret = endpoint.pop("secret")
    assert secret.startswith("whsec_")
    shown = api.admin.get(f"{PATH}/{endpoint['id']}").json()
    assert shown == endpoint
    assert (shown["object"], shown["format"], shown["is_enabled"]) == (
        "webhook_endpoint",
        "standard",
        True,
    )
    assert shown["events"] == [
        "job.started",
        "job.output_committed",
        "job.succeeded",
        "job.failed",
        "job.cancelled",
    ]
    assert shown in api.admin.get(PATH).json()["data"]


def test_no_secret_and_no_key_is_in_the_database(api: LiveApi, endpoint: Any) -> None:
    key = api.settings.secret_key_file.read_text().strip()
    with api.store._engine.connect() as connection:
        rows = [
            row
            for table in (webhook_endpoints, outbox)
            for row in connection.execute(table.select())
        ]
    database = (api.settings.data_dir / "mergeyard.db").read_bytes()
    for hidden in (endpoint["secret"], endpoint["secret"].removeprefix("whsec_"), key):
        assert hidden not in str(rows)
        assert hidden.encode() not in database


def test_endpoints_change_and_go(api: LiveApi, endpoint: Any) -> None:
    place = f"{PATH}/{endpoint['id']}"
    changes = {
        "url": "https://example.org/",
        "description": "for ops",
        "events": ["job.failed"],
        "format": "cloudevents",
        "is_enabled": False,
    }
    changed = api.admin.patch(place, json=changes)
    assert changed.status_code == 200
    assert {name: changed.json()[name] for name in changes} == changes
    assert api.admin.patch(place, json={}).json() == changed.json()
    check_problem(api.admin.post(f"{place}/test"), "endpoint_disabled")
    assert api.admin.delete(place).status_code == 204
    check_problem(api.admin.get(place), "not_found")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "https://127.0.0.1/",
        "https://[::ffff:10.0.0.1]/",
        "https://2130706433/",
    ],
)
def test_addresses_that_lead_inside_are_refused(api: LiveApi, endpoint: Any, url: str) -> None:
    check_problem(api.admin.post(PATH, json={"url": url}), "address_refused")
    check_problem(api.admin.patch(f"{PATH}/{endpoint['id']}", json={"url": url}), "address_refused")


@pytest.mark.parametrize(
    "fields",
    [
        {"events": []},
        {"events": ["endpoint.test"]},
        {"events": ["job.progress"]},
        {"format": "xml"},
        {"url": None},
        {"secret": "whsec_mine"},
        {"description": "x" * 501},
    ],
)
def test_what_is_no_endpoint_is_refused(api: LiveApi, fields: dict[str, Any]) -> None:
    body = {"url": "https://example.com/hook", **fields}
    response = api.admin.post(PATH, json=body)
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"].startswith(f"/{next(iter(fields))}")


def test_jobs_lead_to_deliveries_that_can_be_listed_in_pages(api: LiveApi, endpoint: Any) -> None:
    job, _ = api.bring_to(JobState.SUCCEEDED)
    url: str | None = f"{PATH}/{endpoint['id']}/deliveries?limit=2&state=pending"
    found: list[dict[str, Any]] = []
    while url:
        page = api.admin.get(url)
        assert ("link" in page.headers) == (page.json()["next_url"] is not None)
        found += page.json()["data"]
        url = page.json()["next_url"]
    assert {item["type"] for item in found} == {
        "job.started",
        "job.output_committed",
        "job.succeeded",
    }
    assert {item["data"]["job_id"] for item in found} == {job.id}
    one = api.admin.get(f"{PATH}/{endpoint['id']}/deliveries/{found[0]['id']}").json()
    assert one == found[0]
    assert (one["object"], one["state"], one["attempts"]) == ("webhook_delivery", "pending", 0)


def test_a_cursor_is_of_one_endpoint_and_state(api: LiveApi, endpoint: Any) -> None:
    for _ in range(2):
        assert api.admin.post(f"{PATH}/{endpoint['id']}/test").status_code == 202
    other = create(api)
    first = api.admin.get(f"{PATH}/{endpoint['id']}/deliveries?limit=1").json()
    cursor = {"cursor": first["next_cursor"]}
    mine, others = (f"{PATH}/{item['id']}/deliveries" for item in (endpoint, other))
    assert api.admin.get(mine, params=cursor).status_code == 200
    check_problem(api.admin.get(others, params=cursor), "bad_cursor")
    check_problem(api.admin.get(mine, params={**cursor, "state": "failed"}), "bad_cursor")
    check_problem(api.admin.get(mine, params={"cursor": "x"}), "bad_cursor")


def test_a_test_and_a_replay_are_deliveries_to_be_looked_at(api: LiveApi, endpoint: Any) -> None:
    place = f"{PATH}/{endpoint['id']}"
    asked = api.admin.post(f"{place}/test")
    assert asked.status_code == 202
    delivery = asked.json()
    assert delivery["type"] == "endpoint.test"
    assert api.admin.get(asked.headers["location"]).json() == delivery
    taken = api.store.take_delivery(60)
    assert taken is not None
    api.store.finish_attempt(taken.delivery, AttemptOutcome(state=DeliveryState.FAILED))
    replayed = api.admin.post(f"{place}/deliveries/{delivery['id']}/replay")
    assert replayed.status_code == 202
    assert replayed.json()["message_id"] == delivery["message_id"]
    assert replayed.json()["id"] != delivery["id"]
    assert api.admin.get(replayed.headers["location"]).json() == replayed.json()


def test_a_rotation_shows_the_new_secret_once(api: LiveApi, endpoint: Any) -> None:
    place = f"{PATH}/{endpoint['id']}"
    rotated = api.admin.post(f"{place}/rotate-secret", json={"overlap_seconds": 60}).json()
    assert rotated.pop("secret") != endpoint["secret"]
    assert rotated["secret_version"] == 2
    expires_at = datetime.fromisoformat(rotated["previous_expires_at"])
    assert timedelta(0) < expires_at - datetime.now(UTC) <= timedelta(seconds=60)
    assert api.admin.get(place).json() == rotated
    by_default = api.admin.post(f"{place}/rotate-secret").json()
    expires_at = datetime.fromisoformat(by_default["previous_expires_at"])
    assert expires_at - datetime.now(UTC) > timedelta(hours=23)


@pytest.mark.parametrize("endpoint_id", ["x", "whe_UPPER", "whe_" + "1" * 27, "job_" + "0" * 26])
def test_what_is_no_endpoints_id_is_no_endpoint(api: LiveApi, endpoint_id: str) -> None:
    check_problem(api.admin.get(f"{PATH}/{endpoint_id}"), "not_found")


def test_the_metrics_tell_how_late_deliveries_are(api: LiveApi, endpoint: Any) -> None:
    def overdue() -> float:
        lines = api.admin.get("/metrics").text.splitlines()
        (line,) = (line for line in lines if line.startswith("mergeyard_outbox_oldest_pending"))
        return float(line.split()[1])

    while (taken := api.store.take_delivery(3600)) is not None:
        api.store.finish_attempt(taken.delivery, AttemptOutcome(state=DeliveryState.FAILED))
    assert overdue() == 0
    api.admin.post(f"{PATH}/{endpoint['id']}/test")
    api.wait_until(lambda: overdue() > 0)
