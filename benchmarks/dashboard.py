"""How the dashboard keeps up with a job of 126 layers in 500 shards, told of 20 times a second.

Measured in a real Chromium (``tests/support/browser.py``): time until the list of jobs and the
job's page can be read, tasks that held the page for more than 50 ms, and frames drawn.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
import torch
from playwright.sync_api import Page

from benchmarks.large_job import LargeJob
from benchmarks.records import write_record
from merging.storage.router import open_storage
from service.app import create_app
from service.auth import Scope
from service.jobs.sql_store import SqlJobStore, open_store
from service.server import Server, address_of, bind
from service.settings import load_settings
from tests.support.browser import chromium, log_in, open_page

_WATCH = """() => {
  const seen = { frames: 0, long: [], begin: performance.now() };
  new PerformanceObserver(list => {
    for (const entry of list.getEntries()) seen.long.push(entry.duration);
  }).observe({ type: 'longtask' });
  const count = () => { seen.frames += 1; requestAnimationFrame(count); };
  requestAnimationFrame(count);
  window.seen = seen;
}"""


def main(arguments: list[str] | None = None) -> None:
    """Serve, tell, look."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20, help="that the job takes")
    parser.add_argument("--json", type=Path, help="where the record goes")
    options = parser.parse_args(arguments)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as (url, token, store):
        figures = measure(url, token, LargeJob(store), options.seconds)
    for name, figure in figures.items():
        print(f"{name:28} {figure}")
    if options.json:
        write_record(options.json, torch.device("cpu"), figures)


def measure(url: str, token: str, job: LargeJob, seconds: float) -> dict[str, Any]:
    """The figures of one run."""
    with chromium() as browser, open_page(browser) as page:
        log_in(page, url, token)
        list_seconds = _seconds_until(page, f"{url}/jobs", "table tbody tr")
        job_seconds = _seconds_until(page, f"{url}/jobs/{job.id}", ".layer-map canvas")
        page.evaluate(_WATCH)
        with job.telling(seconds):
            page.get_by_test_id("sentence").get_by_text("500 of 500").wait_for(timeout=300_000)
        seen = page.evaluate("({...seen, elapsed: performance.now() - seen.begin})")
    long = seen["long"]
    return {
        "list_ready_seconds": round(list_seconds, 2),
        "job_page_ready_seconds": round(job_seconds, 2),
        "told_seconds": round(seen["elapsed"] / 1000, 1),
        "frames_per_second": round(1000 * seen["frames"] / seen["elapsed"], 1),
        "long_tasks": len(long),
        "longest_task_milliseconds": round(max(long, default=0)),
        "share_of_time_in_long_tasks": round(sum(long) / seen["elapsed"], 3),
    }


def _seconds_until(page: Page, url: str, selector: str) -> float:
    begin = time.perf_counter()
    page.goto(url)
    page.locator(selector).first.wait_for()
    return time.perf_counter() - begin


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, str, SqlJobStore]]:
    """Address, token and store of a service without a runner, so that nobody takes its jobs."""
    settings = load_settings(data_dir=folder, storage_roots=[str(folder)], pool="local")
    store = open_store(settings.effective_database_url)
    _, token = store.create_token("benchmark", [Scope.ADMIN])
    server = Server(create_app(settings, store, storage=open_storage([str(folder)])))
    listener = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield address_of(listener), token, store
    finally:
        server.request_stop()
        thread.join()
        store.close()


if __name__ == "__main__":
    main()
