"""Which addresses the dashboard answers, with what headers, and what it leaves to the API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.responses import PlainTextResponse

from service.dashboard.files import Dashboard

PAGE = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    built = tmp_path / "static"
    (built / "assets").mkdir(parents=True)
    (built / "index.html").write_text('<html><head><base href="/"></head></html>')
    (built / "assets" / "app-1a2b.js").write_text("void 0;")
    (built / "icon.svg").write_text("<svg/>")
    (tmp_path / "secret").write_text("not to be read")
    (built / "link").symlink_to(tmp_path / "secret")
    return built


def client(folder: Path, root_path: str = "") -> httpx.AsyncClient:
    async def state(scope, receive, send):
        scope["state"] = {}
        scope["root_path"] = root_path
        await dashboard(scope, receive, send)

    dashboard = Dashboard(PlainTextResponse("api"), folder=folder, root_path=root_path)
    return httpx.AsyncClient(transport=httpx.ASGITransport(state), base_url="http://x")


@pytest.fixture
def http(folder: Path) -> Iterator[httpx.AsyncClient]:
    return client(folder)


async def _get(http: httpx.AsyncClient, path: str, **headers: str) -> httpx.Response:
    async with http:
        return await http.get(path, headers=headers)


def get(http: httpx.AsyncClient, path: str, headers: dict[str, str] | None = None):
    import anyio

    return anyio.run(lambda: _get(http, path, **(headers or {})))


def test_files_with_a_digest_in_their_name_are_kept_for_ever(http: httpx.AsyncClient) -> None:
    answer = get(http, "/assets/app-1a2b.js")
    assert answer.text == "void 0;"
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.headers["content-type"].startswith("text/javascript")


def test_other_files_are_asked_for_anew_and_not_sent_again(folder: Path) -> None:
    answer = get(client(folder), "/icon.svg")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["content-type"] == "image/svg+xml"
    again = get(client(folder), "/icon.svg", {"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("path", ["/", "/jobs", "/jobs/job_1", "/compare?a=1", "/index.html"])
def test_every_view_is_the_same_page(folder: Path, path: str) -> None:
    answer = get(client(folder), path, PAGE)
    assert answer.text == '<html><head><base href="/"></head></html>'
    assert answer.headers["cache-control"] == "no-cache"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize("path", ["/mergeyard/jobs/job_1", "/mergeyard", "/jobs/job_1"])
def test_behind_a_prefix_the_page_knows_it(folder: Path, path: str) -> None:
    answer = get(client(folder, "/mergeyard"), path, PAGE)
    assert '<base href="/mergeyard/">' in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "/v1/jobs",
        "/healthz",
        "/metrics",
        "/auth?code=1",
        "/openapi.json",
        "/assets/gone.js",
    ],
)
def test_the_rest_is_left_to_the_api(folder: Path, path: str) -> None:
    assert get(client(folder), path, PAGE).text == "api"


def test_only_pages_are_shown_in_place_of_what_is_not_there(folder: Path) -> None:
    assert get(client(folder), "/nothing").text == "api"
    assert get(client(folder), "/nothing", {"Accept": "application/json"}).text == "api"


@pytest.mark.parametrize(
    "path", ["/link", "/../secret", "/%2e%2e/secret", "/assets/..%2f..%2fsecret", "/assets/"]
)
def test_nothing_outside_the_folder_is_read(folder: Path, path: str) -> None:
    for headers in (PAGE, {}):
        assert "not to be read" not in get(client(folder), path, headers).text


def test_without_a_build_people_are_told_how_to_make_one(tmp_path: Path) -> None:
    answer = get(client(tmp_path / "none"), "/", PAGE)
    assert answer.status_code == 200
    assert "make dashboard" in answer.text
    assert get(client(tmp_path / "none"), "/jobs/job_1", PAGE).status_code == 404
