"""What a recipe or an output may name: tried through the API, so that no path goes round the check.

The unit tests of storage list every form; here each place in a request that holds an address meets
the forms that matter.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.checkpoints import Family
from tests.support.live_service import LiveService, live_service

REFUSED = {"uri_not_allowed", "bad_uri"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, family: Family) -> Path:
    """``inside`` is the root; a sibling whose name looks alike holds the same models."""
    folder = tmp_path_factory.mktemp("roots")
    for name in ("inside", "inside-of-others"):
        for model in (family.base, *family.experts):
            shutil.copytree(model, folder / name / model.name)
    (folder / "inside" / "link").symlink_to(folder / "inside-of-others")
    leaking = folder / "inside" / "leaking"
    shutil.copytree(folder / "inside" / family.base.name, leaking)
    (leaking / "model.safetensors").unlink()
    (leaking / "model.safetensors").symlink_to(
        folder / "inside-of-others" / family.base.name / "model.safetensors"
    )
    return folder


@pytest.fixture(scope="module")
def walled(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Iterator[LiveService]:
    with live_service(tmp_path_factory.mktemp("walled"), home / "inside") as live:
        yield live


def request(home: Path, family: Family) -> dict[str, Any]:
    names = [str(home / "inside" / model.name) for model in (family.base, *family.experts)]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": names[0],
        "models": [{"model": name} for name in names[1:]],
    }
    return {"recipe": recipe, "output_uri": str(home / "inside" / "merged")}


def set_base(body: dict[str, Any], uri: str) -> None:
    body["recipe"]["base_model"] = uri


def set_expert(body: dict[str, Any], uri: str) -> None:
    body["recipe"]["models"][0]["model"] = uri


def set_output(body: dict[str, Any], uri: str) -> None:
    body["output_uri"] = uri


FORMS = [
    "{home}/inside-of-others/base",
    "{home}/inside/../inside-of-others/base",
    "{home}/inside/link/base",
    "file://{home}/inside/%2e%2e/inside-of-others/base",
    "file://{home}/inside/..%2finside-of-others/base",
    "file://{home}/inside-of-others/base",
    "//{home}/inside-of-others/base",
    "/proc/self/cwd",
    "/etc",
    "s3://somebody/else",
    "S3://somebody/else",
]


@pytest.mark.parametrize("place", [set_base, set_expert, set_output])
@pytest.mark.parametrize("form", FORMS)
def test_what_lies_outside_is_refused_wherever_it_is_named(
    walled: LiveService,
    home: Path,
    family: Family,
    form: str,
    place: Callable[[dict[str, Any], str], None],
) -> None:
    body = request(home, family)
    place(body, form.format(home=home))
    for path in ("/v1/plans", "/v1/jobs"):
        answer = post(walled, path, body)
        assert answer.status_code in (403, 422), answer.text
        codes = {answer.json()["code"], *(item["code"] for item in answer.json()["errors"])}
        assert codes & REFUSED, answer.text
    assert not list((home / "inside-of-others").rglob("*merged*"))


def test_weights_behind_a_link_out_of_the_root_are_not_read(
    walled: LiveService, home: Path, family: Family
) -> None:
    body = request(home, family)
    set_base(body, str(home / "inside" / "leaking"))
    answer = post(walled, "/v1/jobs", body)
    assert answer.status_code in (403, 422), answer.text
    assert answer.json()["code"] in ("uri_not_allowed", "missing_file")  # as if it were not there


def test_an_index_cannot_name_files_outside_its_folder(
    walled: LiveService, home: Path, family: Family
) -> None:
    sly = home / "inside" / "sly"
    shutil.copytree(home / "inside" / family.base.name, sly, dirs_exist_ok=True)
    (sly / "model.safetensors").unlink(missing_ok=True)
    for target in ("../../inside-of-others/base/model.safetensors", "/etc/passwd", "..\\x"):
        text = f'{{"weight_map": {{"model.norm.weight": {target!r}}}}}'.replace("'", '"')
        (sly / "model.safetensors.index.json").write_text(text)
        body = request(home, family)
        set_base(body, str(sly))
        answer = post(walled, "/v1/plans", body)
        assert answer.status_code in (403, 422), answer.text
        assert "root:" not in answer.text


def test_what_lies_inside_is_allowed(walled: LiveService, home: Path, family: Family) -> None:
    body = copy.deepcopy(request(home, family))
    set_base(body, f"file://{home}/inside/{family.base.name}")
    answer = post(walled, "/v1/plans", body)
    assert answer.status_code == 201, answer.text


def post(service: LiveService, path: str, body: dict[str, Any]) -> httpx.Response:
    headers = {"Authorization": f"Bearer {service.token}"}
    return httpx.post(f"{service.url}{path}", json=body, headers=headers, timeout=60)
