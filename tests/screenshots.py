"""Pictures of every page at two widths in two themes, over real merges of small models.

``python -m tests.screenshots`` writes them to ``build/screenshots``, and with ``--readme`` the few
that the README shows, compressed, to ``docs/images``.
"""

from __future__ import annotations

import argparse
import base64
import tempfile
from pathlib import Path
from typing import Any

import httpx
import torch
from playwright.sync_api import Browser, Page, expect
from safetensors.torch import load_file, save_file

from tests.support.browser import chromium, log_in, open_page
from tests.support.checkpoints import make_family
from tests.support.gated_engine import ENGINE, open_gate
from tests.support.live_service import LiveService, live_service

ROOT = Path(__file__).parents[1]
WIDTHS = {"wide": (1280, 860), "phone": (390, 844)}
EXPERTS = ("chat", "code", "maths")
_WEBP = """async png => {
  const image = await createImageBitmap(await (await fetch(png)).blob());
  const canvas = new OffscreenCanvas(image.width, image.height);
  canvas.getContext('2d').drawImage(image, 0, 0);
  const blob = await canvas.convertToBlob({ type: 'image/webp', quality: 0.8 });
  const bytes = new Uint8Array(await blob.arrayBuffer());
  return btoa(Array.from(bytes, byte => String.fromCharCode(byte)).join(''));
}"""


class Yard:
    """A service with jobs in several states."""

    def __init__(self, service: LiveService, root: Path) -> None:
        self.service = service
        self._root = root
        headers = {"Authorization": f"Bearer {service.token}"}
        self._api = httpx.Client(base_url=service.url, headers=headers, timeout=60)

    def fill(self) -> None:
        """Jobs that ended in every way, and one that stands half-way."""
        for name, method in (("linear-soup", "linear"), ("assistant-ties", "ties")):
            self._wait(self._submit(name, method), "succeeded")
        self._wait(self._submit("assistant-broken", "swudi_a", experts=("chat", "torn")), "failed")
        stopped = self._submit("assistant-wudi-long", "wudi", shards=3)
        self._api.post(f"/v1/jobs/{stopped}/cancel")
        self._wait(stopped, "cancelled")
        self.solved = self._submit("assistant-swudi", "swudi_a", labels={"team": "language"})
        self._wait(self.solved, "succeeded")
        self.other = self._submit("assistant-wudi", "wudi", labels={"team": "language"})
        self._wait(self.other, "succeeded")
        self.failed = self._api.get("/v1/jobs?state=failed").json()["data"][0]["id"]
        self.running = self._submit("assistant-large", "swudi_a", shards=34)
        while self._api.get(f"/v1/jobs/{self.running}").json()["progress"]["shards_done"] < 34:
            pass

    def _submit(
        self,
        name: str,
        method: str,
        *,
        shards: int = 9999,
        experts: tuple[str, ...] = EXPERTS,
        **more: Any,
    ) -> str:
        recipe: dict[str, Any] = {
            "merge_method": method,
            "base_model": str(self._root / "models/base"),
            "models": [{"model": str(self._root / "models" / expert)} for expert in experts],
        }
        if method == "linear":
            del recipe["base_model"]
        output = self._root / name
        open_gate(output, shards)
        body = {"recipe": recipe, "output_uri": str(output), **more}
        options = {"max_shard_size": "300kB", "check_finite": True}
        response = self._api.post("/v1/jobs", json={**body, "options": options})
        assert response.status_code == 201, response.text
        return str(response.json()["id"])

    def _wait(self, job_id: str, state: str) -> None:
        stream = {"Accept": "text/event-stream"}
        self._api.get(f"/v1/jobs/{job_id}/events", headers=stream, timeout=300)
        assert self._api.get(f"/v1/jobs/{job_id}").json()["state"] == state

    def views(self) -> dict[str, str]:
        """Address of every page by its name."""
        jobs = f"jobs/{self.solved}"
        return {
            "jobs": "jobs",
            "job": f"jobs/{self.running}",
            "job-failed": f"jobs/{self.failed}",
            "job-shards": f"{jobs}?tab=shards",
            "job-report": f"{jobs}?tab=report",
            "job-recipe": f"{jobs}?tab=recipe",
            "job-log": f"{jobs}?tab=events",
            "new": f"new?from={self.solved}",
            "new-form": f"new?from={self.solved}&as=form",
            "compare": f"compare?job={self.solved}&job={self.other}",
            "workers": "workers",
            "settings": "settings",
            "settings-webhooks": "settings?tab=webhooks",
        }


def main(arguments: list[str] | None = None) -> None:
    """Serve, merge, look."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="only the README's, to docs/images")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="models-") as folder:
        root = Path(folder)
        _make_models(root)
        with live_service(root / "data", root, engine=ENGINE) as service, chromium() as browser:
            yard = Yard(service, root)
            yard.fill()
            (_readme if options.readme else _everything)(browser, yard)


def _make_models(root: Path) -> None:
    family = make_family(root / "models", len(EXPERTS), hidden=128, layers=24)
    for folder, name in zip(family.experts, EXPERTS, strict=True):
        folder.rename(root / "models" / name)
    torn = root / "models" / "torn"
    torn.mkdir()
    for file in (root / "models/code").iterdir():
        (torn / file.name).write_bytes(file.read_bytes())
    state = load_file(torn / "model.safetensors")
    state["model.layers.11.mlp.up_proj.weight"][3, 7] = torch.nan
    save_file(state, torn / "model.safetensors", metadata={"format": "pt"})


def _everything(browser: Browser, yard: Yard) -> None:
    folder = ROOT / "build" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)

    def save(name: str, picture: bytes) -> None:
        (folder / f"{name}.png").write_bytes(picture)

    for width, (across, down) in WIDTHS.items():
        for theme in ("light", "dark"):
            with open_page(browser, width=across, height=down, theme=theme) as page:
                page.goto(yard.service.url)
                expect(page.get_by_label("API token")).to_be_visible()
                save(f"login-{width}-{theme}", page.screenshot())
                log_in(page, yard.service.url, yard.service.token)
                for name, address in yard.views().items():
                    _look(page, yard, address)
                    save(f"{name}-{width}-{theme}", page.screenshot(full_page=True))


README = {
    "job": ("job", "light"),
    "report": ("job-report", "dark"),
    "new-merge": ("new", "light"),
    "compare": ("compare", "dark"),
}
"""View and theme of the README's pictures."""


def _readme(browser: Browser, yard: Yard) -> None:
    folder = ROOT / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (view, theme) in README.items():
        with open_page(browser, width=1180, height=760, theme=theme, bypass_csp=True) as page:
            log_in(page, yard.service.url, yard.service.token)
            _look(page, yard, yard.views()[view])
            picture = base64.b64encode(page.screenshot()).decode()
            webp = page.evaluate(_WEBP, f"data:image/png;base64,{picture}")
            (folder / f"{name}.webp").write_bytes(base64.b64decode(webp))


def _look(page: Page, yard: Yard, address: str) -> None:
    """Open a view and wait until it stands still: nothing says that it is being read."""
    page.goto(f"{yard.service.url}/{address}")
    expect(page.locator("h1").first).to_be_visible()
    expect(page.get_by_text("Reading the")).to_have_count(0)
    expect(page.get_by_text("checking …")).to_have_count(0)
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.wait_for_timeout(400)  # a chart is drawn in the frame after its data came


if __name__ == "__main__":
    main()
