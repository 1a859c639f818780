"""Writing recipes, comparing jobs, and what holds for every page, in a real Chromium."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import Yard
from tests.support.browser import log_in, open_page
from tests.support.gated_engine import open_gate
from tests.support.live_service import live_service

pytestmark = [pytest.mark.browser, pytest.mark.slow]

AXE = Path(__file__).parents[2] / "dashboard" / "node_modules" / "axe-core" / "axe.min.js"
FIRST_VIEW_BYTES = 100_000


def type_recipe(page: Page, text: str) -> None:
    editor = page.get_by_role("textbox", name="Recipe in YAML")
    editor.click()
    page.keyboard.press("Control+A")
    page.keyboard.press("Delete")  # typed over, Chromium would style the new text as the old
    page.keyboard.insert_text(text)


def test_a_recipe_is_checked_planned_and_submitted(page: Page, yard: Yard) -> None:
    """Typed wrong first, then mended, then planned; only then can it be sent."""
    page.goto(f"{yard.service.url}/new")
    submit = page.get_by_role("button", name="Submit the merge")
    base, *experts = [str(folder) for folder in (yard.family.base, *yard.family.experts)]
    models = "".join(f"  - model: {expert}\n" for expert in experts)
    type_recipe(page, f"merge_method: tiess\nbase_model: {base}\nmodels:\n{models}")
    faults = page.get_by_test_id("faults")
    expect(faults).to_contain_text("Did you mean ties")
    expect(submit).to_be_disabled()
    type_recipe(page, f"merge_method: ties\nbase_model: {base}\nmodels:\n{models}")
    expect(faults).to_be_hidden()
    page.get_by_role("button", name="Form").click()
    page.get_by_label("density").first.fill("0.4")
    page.get_by_label("density").first.blur()
    page.get_by_label("Output", exact=True).fill(str(yard.root / "from-editor"))
    expect(page.get_by_test_id("plan")).to_contain_text("To read")
    expect(submit).to_be_enabled()
    open_gate(yard.root / "from-editor", 99)
    submit.click()
    expect(page.get_by_test_id("sentence")).to_contain_text("Merged 2 experts into from-editor")
    page.get_by_role("link", name="Recipe & lineage").click()
    expect(page.get_by_text("density: 0.4").first).to_be_visible()
    page.get_by_role("link", name="Clone").click()
    expect(page.get_by_label("Output", exact=True)).to_have_value(str(yard.root / "from-editor-2"))


def test_what_a_plan_refuses_is_said_before_anything_is_sent(page: Page, yard: Yard) -> None:
    page.goto(f"{yard.service.url}/new?example=swudi-a")
    page.get_by_label("Output", exact=True).fill("/somewhere/else")
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.get_by_role("button", name="Submit the merge")).to_be_disabled()


def test_two_jobs_are_compared_side_by_side(page: Page, yard: Yard) -> None:
    ids = [yard.submit("plain", "linear"), yard.submit("solved", "swudi_a")]
    for name in ("plain", "solved"):
        open_gate(yard.root / name, 99)
    page.goto(f"{yard.service.url}/jobs")
    for job_id in ids:
        expect(page.get_by_role("row", name=re.compile(job_id))).to_contain_text("succeeded")
        page.get_by_label(f"Compare {job_id}").check()
    page.get_by_role("button", name="Compare 2 jobs").click()
    digests = page.get_by_role("row", name=re.compile("Output digest"))
    expect(digests).to_contain_text("≠ different")
    method = page.get_by_role("row", name="/merge_method")
    expect(method).to_contain_text('"linear"')
    expect(method).to_contain_text('"swudi_a"')
    expect(page.get_by_role("heading", name="Interference that is left, by layer")).to_be_visible()


def test_workers_are_shown_with_what_they_have(page: Page, yard: Yard) -> None:
    job_id = yard.submit("being-worked-on")
    page.goto(f"{yard.service.url}/workers")
    row = page.get_by_role("row", name=re.compile(job_id))
    expect(row).to_contain_text("shard 0 of")
    row.get_by_role("link").click()
    expect(page).to_have_url(f"{yard.service.url}/jobs/{job_id}?tab=shards")
    open_gate(yard.root / "being-worked-on", 99)
    expect(page.get_by_test_id("sentence")).to_contain_text("Merged 2 experts")


def test_a_token_is_made_used_and_revoked(page: Page, browser: Browser, yard: Yard) -> None:
    page.goto(f"{yard.service.url}/settings")
    page.get_by_label("Name").fill("reader")
    page.get_by_role("button", name="Make the token").click()
    secret = page.get_by_test_id("secret").text_content() or ""
    with open_page(browser) as other:
        log_in(other, yard.service.url, secret)
        other.goto(f"{yard.service.url}/settings")
        expect(other.get_by_text("This needs the scope admin")).to_be_visible()
        page.get_by_role("row", name=re.compile("^reader")).get_by_role("button").click()
        page.get_by_role("button", name="Revoke it").click()
        expect(page.get_by_role("row", name=re.compile("^reader"))).to_contain_text("revoked")
        other.goto(f"{yard.service.url}/jobs")
        expect(other.get_by_label("API token")).to_be_visible()


def test_a_webhook_endpoint_is_made_disabled_and_forgotten(page: Page, yard: Yard) -> None:
    page.goto(f"{yard.service.url}/settings?tab=webhooks")
    page.get_by_label("Address").fill("http://127.0.0.1/private")
    page.get_by_role("button", name="Make the endpoint").click()
    expect(page.get_by_role("alert")).to_be_visible()
    page.get_by_label("Address").fill("https://hooks.example.org/merges")
    page.get_by_role("button", name="Make the endpoint").click()
    expect(page.get_by_test_id("secret")).to_contain_text("whsec_")
    page.get_by_role("button", name="Send a test").click()  # nothing sends it in this service
    expect(page.get_by_role("region", name="Deliveries")).to_contain_text("endpoint.test")
    page.get_by_role("button", name="Disable").click()
    expect(page.get_by_role("button", name="Enable")).to_be_visible()
    page.get_by_role("button", name="Forget").click()
    page.get_by_role("button", name="Forget it").click()
    expect(page.get_by_text("Nobody is told of jobs yet.")).to_be_visible()


def views(yard: Yard) -> Iterator[str]:
    """Every page, with something on it."""
    job_id = yard.submit("looked-at", options={"max_shard_size": "100kB", "overwrite": True})
    open_gate(yard.root / "looked-at", 99)
    with yard.api as api:
        assert api.get(f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}).text
    yield from ("jobs", "new", "new?as=form&example=ties", f"compare?job={job_id}&job={job_id}")
    yield from ("workers", "settings", "settings?tab=webhooks", "settings?tab=about")
    for tab in ("", "shards", "report", "recipe", "events"):
        yield f"jobs/{job_id}?tab={tab}"


def test_every_view_links_to_its_json_and_copies_the_command_that_reads_it(
    browser: Browser, yard: Yard
) -> None:
    clipboard = {"permissions": ["clipboard-read", "clipboard-write"]}
    with open_page(browser, **clipboard) as page, yard.api as api:
        log_in(page, yard.service.url, yard.service.token)
        for view in views(yard):
            look(page, yard, view)
            address = page.get_by_role("link", name="JSON").first.get_attribute("href")
            assert address, view
            assert api.get(address).json()["object"], view
            page.get_by_role("button", name=re.compile("as a curl command")).first.click()
            page.get_by_text("copied", exact=True).first.wait_for()
            command = shlex.split(page.evaluate("navigator.clipboard.readText()"))
            assert command[:2] == ["curl", "-H"], view
            target = next(word for word in command if word.startswith(yard.service.url))
            if not view.startswith("new"):  # that one submits, and is tried where it is submitted
                assert api.get(target).json() == api.get(address).json(), view


def look(page: Page, yard: Yard, view: str) -> None:
    """Open a view and wait until nothing is being read any more."""
    page.goto(f"{yard.service.url}/{view}")
    page.locator("h1").wait_for()
    expect(page.get_by_text("Reading the")).to_have_count(0)
    expect(page.get_by_text("checking …")).to_have_count(0)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_any_page(browser: Browser, yard: Yard, theme: str) -> None:
    with open_page(browser, theme=theme, bypass_csp=True) as page:
        page.goto(yard.service.url)
        found = {"login": axe(page)}
        log_in(page, yard.service.url, yard.service.token)
        for view in views(yard):
            look(page, yard, view)
            found[view] = axe(page)
    assert {view: faults for view, faults in found.items() if faults} == {}


def axe(page: Page) -> list[str]:
    """Serious and critical findings of axe-core."""
    page.add_script_tag(path=AXE)
    result: dict[str, Any] = page.evaluate("axe.run()")
    return [
        f"{violation['id']}: {node['html'][:160]}: {node['failureSummary'][-200:]}"
        for violation in result["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def test_no_page_is_wider_than_a_phone(browser: Browser, yard: Yard) -> None:
    with open_page(browser, width=390, height=800) as page:
        log_in(page, yard.service.url, yard.service.token)
        for view in views(yard):
            look(page, yard, view)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, view


def test_the_first_view_is_small_and_nothing_comes_from_elsewhere(
    browser: Browser, yard: Yard
) -> None:
    with open_page(browser) as page:
        log_in(page, yard.service.url, yard.service.token)
        seen: list[str] = []
        page.on("request", lambda request: seen.append(request.url))
        cdp = page.context.new_cdp_session(page)
        cdp.send("Network.enable")
        cdp.send("Network.setCacheDisabled", {"cacheDisabled": True})
        received: list[int] = []
        cdp.on("Network.loadingFinished", lambda event: received.append(event["encodedDataLength"]))
        page.goto(f"{yard.service.url}/jobs")
        expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
        page.wait_for_function("performance.getEntriesByType('resource').length >= 4")
        assert 0 < sum(received) < FIRST_VIEW_BYTES
        assert [url for url in seen if not url.startswith(yard.service.url)] == []


def test_pages_work_under_a_path_prefix(browser: Browser, yard: Yard) -> None:
    """As behind a proxy that takes the prefix off: here it is left on, which routes know too."""
    folder = yard.root / "prefixed"
    folder.mkdir()
    with (
        live_service(folder, yard.root, root_path="/tools/merge") as service,
        open_page(browser) as page,
    ):
        log_in(page, f"{service.url}/jobs", service.token)
        page.get_by_role("link", name="New merge").first.click()
        expect(page).to_have_url(f"{service.url}/new")
        page.reload()
        expect(page.get_by_role("heading", name="New merge")).to_be_visible()
        page.get_by_role("link", name="Mergeyard").click()
        expect(page.get_by_text("No job yet.")).to_be_visible()
