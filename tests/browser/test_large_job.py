"""A job of 126 layers in 500 shards, told of 20 times a second, does not hold the page up.

How smoothly it runs is measured by ``python -m benchmarks dashboard``, and asserted nowhere.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from benchmarks.dashboard import serving
from benchmarks.large_job import LargeJob
from service.jobs.states import JobState
from tests.support.browser import log_in, open_page

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_the_page_answers_while_a_large_job_runs(browser: Browser, tmp_path: Path) -> None:
    with serving(tmp_path) as (url, token, store), open_page(browser) as page:
        job = LargeJob(store)
        log_in(page, url, token)
        page.goto(f"{url}/jobs/{job.id}")
        sentence = page.get_by_test_id("sentence")
        with job.telling(4):
            expect(sentence).to_contain_text(re.compile(r"Merging: [1-9]"))
            for tab in ("Shards", "Log", "Overview"):
                link = page.get_by_role("link", name=tab, exact=True)
                link.click()
                expect(link).to_have_attribute("aria-current", "page")
            assert store.get(job.id).state == JobState.RUNNING
            layers = page.get_by_role("application", name=re.compile("Map of 1,136 tensors"))
            layers.focus()
            for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
                layers.press(key)
            expect(page.locator("#layer-map-cell")).to_contain_text("16384 × 16384 BF16")
        expect(sentence).to_contain_text("500 of 500 shards", timeout=60_000)
        expect(layers).to_have_attribute("data-written", "1136")
