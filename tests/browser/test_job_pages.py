"""What a person sees of jobs, in a real Chromium, over real merges."""

from __future__ import annotations

import re

import pytest
import torch
from playwright.sync_api import Browser, Page, expect
from safetensors.torch import load_file, save_file

from tests.browser.conftest import Yard
from tests.support.browser import log_in, open_page
from tests.support.gated_engine import ENGINE, open_gate
from tests.support.live_service import live_service
from tests.support.merges import recipe

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def job_page(page: Page, yard: Yard, job_id: str) -> None:
    page.goto(f"{yard.service.url}/jobs/{job_id}")


def test_only_a_good_token_opens_the_pages_and_logging_out_closes_them(
    browser: Browser, yard: Yard
) -> None:
    with open_page(browser) as page:
        page.goto(f"{yard.service.url}/jobs")
        page.get_by_label("API token").fill("wrong")
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("alert")).to_contain_text("token is not known")
        page.get_by_label("API token").fill(yard.service.token)
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
        page.reload()
        expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
        page.get_by_role("button", name="log out").click()
        expect(page.get_by_label("API token")).to_be_visible()
        page.reload()
        expect(page.get_by_label("API token")).to_be_visible()


def test_cells_of_the_layer_map_fill_until_the_merge_has_succeeded(page: Page, yard: Yard) -> None:
    job_id = yard.submit("watched")
    job_page(page, yard, job_id)
    layers = page.get_by_role("application", name=re.compile("Map of"))
    expect(page.get_by_test_id("sentence")).to_contain_text("Merging: 0 of")
    expect(layers).to_have_attribute("data-written", "0")
    open_gate(yard.root / "watched", 2)
    expect(page.get_by_test_id("sentence")).to_contain_text("Merging: 2 of")
    written = int(layers.get_attribute("data-written") or 0)
    assert 0 < written < 30
    words = page.locator("#layer-map-cell")
    layers.focus()
    layers.press("End")  # no key of the map: nothing happens
    layers.press("ArrowDown")
    expect(words).to_contain_text("uploaded")
    open_gate(yard.root / "watched", 99)
    expect(page.get_by_test_id("sentence")).to_contain_text("Merged 2 experts into watched")
    expect(layers).to_have_attribute("data-written", "30")
    for _ in range(2):
        layers.press("ArrowRight")
    layers.press("ArrowDown")
    expect(words).to_contain_text("of interference removed")
    page.get_by_role("link", name="Merge report").click()
    expect(page.get_by_text("What came out")).to_be_visible()
    expect(
        page.get_by_role("img", name=re.compile("Interference of each of 3 layers"))
    ).to_be_visible()


def test_a_failure_names_the_tensor_and_what_to_do_and_a_retry_goes_on(
    page: Page, yard: Yard
) -> None:
    """Three shards are published, then an expert's weights turn out not to be numbers."""
    file = yard.family.experts[0] / "model.safetensors"
    good = file.read_bytes()
    state = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    state[name][0, 0] = torch.nan
    save_file(state, file, metadata={"format": "pt"})
    job_id = yard.submit("poisoned")
    open_gate(yard.root / "poisoned", 99)
    job_page(page, yard, job_id)
    card = page.get_by_test_id("error-card")
    expect(card.locator("dl")).to_contain_text(f"Tensor{name}")
    expect(card).to_contain_text("non_finite_input")
    expect(card).to_contain_text("What to do")
    expect(page.get_by_test_id("sentence")).to_contain_text("Failed after")
    file.write_bytes(good)
    page.get_by_role("button", name="Retry").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("attempt 2")
    dialog.get_by_role("button", name="Retry").click()
    expect(page.get_by_text("attempt 2", exact=True)).to_be_visible()


def test_cancelling_names_what_it_stops(page: Page, yard: Yard) -> None:
    job_id = yard.submit("stopped")
    open_gate(yard.root / "stopped", 1)
    job_page(page, yard, job_id)
    expect(page.get_by_test_id("sentence")).to_contain_text("Merging: 1 of")
    page.get_by_role("button", name="Cancel").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("Cancel the merge into stopped?")
    expect(dialog).to_contain_text("1 of ")
    dialog.get_by_role("button", name="Cancel in order").click()
    expect(page.get_by_test_id("sentence")).to_contain_text("Cancelled")
    expect(page.get_by_role("button", name="Forget")).to_be_visible()


def test_the_list_filters_by_its_address_and_searches(page: Page, yard: Yard) -> None:
    job_id = yard.submit("listed", labels={"team": "vision"})
    open_gate(yard.root / "listed", 99)
    page.goto(f"{yard.service.url}/jobs?label.team=vision")
    row = page.get_by_role("row", name=re.compile(job_id))
    expect(row).to_contain_text("succeeded")
    page.get_by_role("button", name=re.compile("^succeeded")).click()
    expect(page).to_have_url(re.compile("state=succeeded"))
    expect(row).to_be_visible()
    page.get_by_role("searchbox").fill(f"LISTED team=vision {job_id[:12]}")
    expect(page).to_have_url(re.compile("q=LISTED"))
    expect(row).to_be_visible()
    page.get_by_role("searchbox").fill("nothing of the kind")
    expect(page.get_by_text("No job fits these filters.")).to_be_visible()
    page.reload()
    expect(page.get_by_role("searchbox")).to_have_value("nothing of the kind")
    page.get_by_role("link", name="Show all jobs").click()
    expect(row).to_be_visible()


def test_deleting_an_output_names_what_goes_and_asks(page: Page, yard: Yard) -> None:
    job_id = yard.submit("unwanted")
    output = yard.root / "unwanted"
    open_gate(output, 99)
    job_page(page, yard, job_id)
    page.get_by_role("button", name="Delete output").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("Delete the output unwanted?")
    (output / "notes.txt").write_text("not the job's")
    expect(dialog.get_by_role("button", name="Delete")).to_be_visible()
    named = dialog.locator("li span:first-child").all_text_contents()
    assert {*named, "notes.txt"} == {file.name for file in output.iterdir()}
    dialog.get_by_role("button", name="Go back").click()
    expect(dialog).to_be_hidden()
    assert (output / "config.json").exists()
    page.get_by_role("button", name="Delete output").click()
    dialog.get_by_role("button", name=re.compile(r"Delete \d+ files, ")).click()
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()
    expect(page.get_by_role("row", name=re.compile(job_id))).to_have_count(0)
    assert [file.name for file in output.iterdir()] == ["notes.txt"]


def test_an_output_that_another_job_needs_is_kept_and_it_says_so(page: Page, yard: Yard) -> None:
    job_id = yard.submit("needed")
    open_gate(yard.root / "needed", 99)
    job_page(page, yard, job_id)
    expect(page.get_by_test_id("sentence")).to_contain_text("Merged 2 experts into needed")
    reads = recipe(yard.family, "linear")
    reads["models"][0]["model"] = str(yard.root / "needed")
    reader = yard.submit("reader", recipe=reads)
    page.get_by_role("button", name="Delete output").click()
    page.get_by_role("button", name=re.compile(r"Delete \d+ files, ")).click()
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text(reader)
    assert (yard.root / "needed" / "config.json").exists()
    open_gate(yard.root / "reader", 99)


def test_the_variants_of_a_sweep_are_chosen_and_compared(page: Page, yard: Yard) -> None:
    sweep = [{"name": f"keep-{n}", "parameters": {"density": n / 10}} for n in (2, 8)]
    job_id = yard.submit("swept", recipe={**recipe(yard.family, "ties"), "sweep": sweep})
    open_gate(yard.root / "swept", 99)
    job_page(page, yard, job_id)
    expect(page.get_by_test_id("sentence")).to_contain_text("Merged 2 experts into swept")
    page.get_by_role("link", name="Merge report").click()
    variants = page.get_by_role("region", name="Variants")
    first = variants.get_by_role("button", name="keep-2")
    second = variants.get_by_role("button", name="keep-8")
    expect(first).to_have_attribute("aria-pressed", "true")
    shown = page.locator(".card", has_text="Output").last
    second.click()
    expect(page).to_have_url(re.compile("variant=keep-8"))
    page.reload()
    expect(second).to_have_attribute("aria-pressed", "true")
    digest = variants.get_by_role("row", name=re.compile("keep-8")).locator("td").last
    expect(shown).to_contain_text((digest.text_content() or "?").strip())
    page.get_by_role("link", name="compare them").click()
    figures = page.get_by_role("region", name="Figures")
    for name in ("swept/keep-2", "swept/keep-8"):
        expect(figures.get_by_role("link", name=name)).to_be_visible()
    expect(figures.get_by_role("row", name=re.compile("Output digest"))).to_contain_text(
        "different"
    )
    density = page.get_by_role("row", name="/variant/parameters/density")
    expect(density).to_contain_text("0.2")
    expect(density).to_contain_text("0.8")


def test_a_page_goes_on_without_gaps_when_the_service_comes_back(
    browser: Browser, yard: Yard
) -> None:
    root = yard.root / "restarted"
    root.mkdir()
    output = yard.root / "after-restart"
    with open_page(browser) as page:
        with live_service(root, yard.root, engine=ENGINE) as service:
            port = int(service.url.rpartition(":")[2])
            job_id = Yard(service, yard.root, yard.family).submit(output.name)
            open_gate(output, 1)
            log_in(page, service.url, service.token)
            page.goto(f"{service.url}/jobs/{job_id}")
            expect(page.get_by_test_id("sentence")).to_contain_text("Merging: 1 of")
        expect(page.get_by_text("Connection lost")).to_be_visible()
        with live_service(root, yard.root, port=port, engine=ENGINE) as service:
            expect(page.get_by_text("Connection lost")).to_be_hidden()
            open_gate(output, 99)
            expect(page.get_by_test_id("sentence")).to_contain_text("Merged 2 experts")
            page.get_by_role("link", name="Log", exact=True).click()
            shown = page.locator("ol.log .seq").all_text_contents()
            with Yard(service, yard.root, yard.family).api as api:
                events = api.get(f"/v1/jobs/{job_id}/events?limit=1000").json()["data"]
            told = [str(e["seq"]) for e in events if e["type"] != "job.progress"]
            assert shown == told[::-1]
