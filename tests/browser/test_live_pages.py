"""Pages that live by the events of everything: nothing is asked for while nothing happens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
from playwright.sync_api import Browser, Page, expect

from service.jobs.sql_store import SqlJobStore, open_store
from service.jobs.tables import news
from tests.browser.conftest import Yard
from tests.support.browser import log_in, open_page
from tests.support.gated_engine import ENGINE, open_gate
from tests.support.jobs import new_job
from tests.support.live_service import live_service

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def live(page: Page) -> None:
    """Wait until the page follows what happens."""
    expect(page.get_by_test_id("live").first).to_contain_text("live, last update")


def test_rows_change_as_events_come_and_nothing_is_polled(page: Page, yard: Yard) -> None:
    page.clock.install()
    page.goto(f"{yard.service.url}/jobs")
    live(page)
    job_id = yard.submit("appears")
    row = page.get_by_role("row", name=re.compile(job_id))
    expect(row).to_contain_text("running")
    open_gate(yard.root / "appears", 2)
    expect(row.get_by_role("progressbar")).not_to_have_attribute("aria-valuenow", "0")
    open_gate(yard.root / "appears", 99)
    expect(row).to_contain_text("succeeded")
    with yard.api as api:
        api.patch(f"/v1/jobs/{job_id}", json={"labels": {"stage": "final"}})
        expect(row).to_contain_text("stage=final")
        api.delete(f"/v1/jobs/{job_id}")
    expect(row).to_have_count(0)
    for place in ("jobs", "workers", "settings", "settings?tab=webhooks"):
        page.goto(f"{yard.service.url}/{place}")
        live(page)
        page.clock.fast_forward(2000)  # what was gathered is read
        asked: list[str] = []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.clock.fast_forward(30_000)  # every timer of that time goes off
        expect(page.get_by_test_id("live").first).to_contain_text("3")  # seconds ago: it was drawn
        assert asked == []


def test_a_comparison_follows_a_job_that_is_still_running(page: Page, yard: Yard) -> None:
    ids = [yard.submit("compared", "linear"), yard.submit("compared-late", "linear")]
    open_gate(yard.root / "compared", 99)
    page.goto(f"{yard.service.url}/compare?job={ids[0]}&job={ids[1]}")
    live(page)
    digests = page.get_by_role("row", name=re.compile("Output digest"))
    expect(digests).to_contain_text("–")
    open_gate(yard.root / "compared-late", 99)
    expect(digests).to_contain_text("= equal")


def test_workers_tokens_and_deliveries_appear_without_being_asked_for(
    page: Page, yard: Yard
) -> None:
    page.goto(f"{yard.service.url}/workers")
    live(page)
    job_id = yard.submit("worked-on-live")
    expect(page.get_by_role("row", name=re.compile(job_id))).to_contain_text("shard 0 of")
    open_gate(yard.root / "worked-on-live", 99)
    expect(page.get_by_role("row", name=re.compile(job_id))).to_have_count(0)
    with yard.api as api:
        page.goto(f"{yard.service.url}/settings")
        live(page)
        api.post("/v1/tokens", json={"name": "from elsewhere", "scopes": ["jobs:read"]})
        expect(page.get_by_role("row", name=re.compile("^from elsewhere"))).to_be_visible()
        page.goto(f"{yard.service.url}/settings?tab=webhooks")
        live(page)
        hook = api.post("/v1/webhook-endpoints", json={"url": "https://hooks.example.org/x"}).json()
        page.get_by_role("button", name="Deliveries").click()
        expect(page.get_by_text("Nothing was sent yet.")).to_be_visible()
        api.post(f"/v1/webhook-endpoints/{hook['id']}/test")
        deliveries = page.get_by_role("region", name="Deliveries").get_by_role("row")
        expect(deliveries.filter(has_text="endpoint.test")).to_have_count(1)
        page.get_by_role("button", name="Send again").click()
        expect(deliveries.filter(has_text="endpoint.test")).to_have_count(2)
        api.delete(f"/v1/webhook-endpoints/{hook['id']}")
    expect(page.get_by_text("Nobody is told of jobs yet.")).to_be_visible()


@contextmanager
def store_of(data: str) -> Iterator[SqlJobStore]:
    store = open_store(f"sqlite:///{data}/mergeyard.db", migrate=False)
    try:
        yield store
    finally:
        store.close()


@pytest.mark.parametrize("is_long", [False, True], ids=["a moment", "longer than news are kept"])
def test_a_list_shows_what_happened_while_the_service_was_away(
    browser: Browser, yard: Yard, is_long: bool
) -> None:
    data = yard.root / f"away-{is_long}"
    data.mkdir()
    with open_page(browser) as page:
        with live_service(data, yard.root, engine=ENGINE) as service:
            port = int(service.url.rpartition(":")[2])
            job_id = Yard(service, yard.root, yard.family).submit(f"before-{is_long}")
            log_in(page, service.url, service.token)
            page.goto(f"{service.url}/jobs")
            expect(page.get_by_role("row", name=re.compile(job_id))).to_contain_text("running")
        expect(page.get_by_text("Connection lost")).to_be_visible()
        with store_of(str(data)) as store:
            meanwhile, _ = store.submit(new_job())
            store.request_cancel(meanwhile.id)
            store.patch(job_id, labels={"changed": "meanwhile"})
            if is_long:
                with store._engine.begin() as connection:
                    connection.execute(sa.delete(news))
        with live_service(data, yard.root, port=port, engine=ENGINE):
            expect(page.get_by_text("Connection lost")).to_be_hidden()
            live(page)
            row = page.get_by_role("row", name=re.compile(meanwhile.id))
            expect(row).to_contain_text("cancelled")
            row = page.get_by_role("row", name=re.compile(job_id))
            expect(row).to_contain_text("changed=meanwhile")
