"""The documents are right: their commands run, their recipes parse, their links lead somewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from docs.generate import FOLDER, make_reference
from examples.s3_server import S3Server
from merging.method import all_methods
from merging.recipe import parse_recipe
from service.auth import Scope
from service.jobs.records import EventType
from service.jobs.states import JobState
from service.problems import KINDS
from service.settings import ENV_PREFIX, Settings
from tests.support.checkpoints import INDEX_NAME, Family
from tests.support.documents import REPOSITORY, Block, anchors, blocks, links
from tests.support.live_service import LiveService
from tests.support.s3_models import upload_folder
from tests.support.serving import environment

DOCS = REPOSITORY / "docs"
QUICKSTART, API, RECIPES = DOCS / "quickstart.md", DOCS / "api.md", DOCS / "recipes.md"
EXAMPLE_RECIPES = sorted((REPOSITORY / "examples" / "recipes").glob("*.yaml"))
DOCUMENTS = sorted({*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md")})
S3_SECTION = "Models in S3"
SERVE = "mergeyard serve"


@pytest.fixture
def desk(tmp_path: Path, family: Family) -> Path:
    """The folder that a reader works in."""
    for source, name in zip((family.base, *family.experts), ("base", "chat", "code"), strict=True):
        shutil.copytree(source, tmp_path / "models" / name)
    return tmp_path


@pytest.fixture
def variables(service: LiveService, desk: Path) -> dict[str, str]:
    """What the reader's shell knows."""
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(desk),
        "OMP_NUM_THREADS": "1",
        "MERGEYARD_URL": service.url,
        "MERGEYARD_TOKEN": service.token,
    }


def run_shell(commands: list[Block], desk: Path, variables: dict[str, str]) -> str:
    """Run blocks one after the other in one shell; what they print."""
    for tool in ("curl", "jq"):
        assert shutil.which(tool), f"{tool} is missing; tests/install-system.sh installs it"
    script = "\n".join(block.text for block in commands)
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=desk,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def run_python(block: Block, desk: Path, variables: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block.text],
        cwd=desk,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- commands


@pytest.mark.slow
def test_the_quickstart_runs(desk: Path, variables: dict[str, str]) -> None:
    commands = [
        block
        for block in blocks(QUICKSTART, "sh")
        if block.section != S3_SECTION and SERVE not in block.text
    ]
    said = run_shell(commands, desk, variables)
    assert "are as they were written" in said
    outputs = ["merged", "merged-by-service", "merged-as-planned", "merged-later"]
    assert said.count(f"succeeded  {desk}/") == 3
    programs = blocks(QUICKSTART, "python")
    assert len(programs) == 2
    digests = {run_python(program, desk, variables).split()[-1] for program in programs}
    outputs += ["merged-from-python", "merged-in-process"]
    assert all((desk / output / INDEX_NAME).exists() for output in outputs)
    reports = [json.loads((desk / o / "merge_report.json").read_text()) for o in outputs]
    assert {report["output"]["digest"] for report in reports} == digests
    assert len(digests) == 1


@pytest.mark.slow
@pytest.mark.s3
def test_the_quickstart_runs_on_s3(
    desk: Path, variables: dict[str, str], s3: S3Server, bucket: str
) -> None:
    for model in ("base", "chat", "code"):
        upload_folder(s3, desk / "models" / model, bucket, model)
    commands = [block for block in blocks(QUICKSTART, "sh") if block.section == S3_SECTION]
    said = run_shell(commands, desk, {**variables, **s3.environment(), "BUCKET": bucket})
    assert f"s3://{bucket}/merged  " in said
    assert "are as they were written" in said


@pytest.mark.slow
def test_the_tour_of_the_api_runs(desk: Path, variables: dict[str, str]) -> None:
    said = run_shell(blocks(API, "sh"), desk, variables)
    assert (desk / "merged-by-curl" / INDEX_NAME).exists()
    for event in ("job.created", "shard.finished", "job.finished"):
        assert f"event: {event}\n" in said
    refusal = json.loads(said[said.rindex("\n{") :])
    (shown,) = [json.loads(block.text) for block in blocks(API, "json")]
    assert refusal.keys() == shown.keys()
    same = ("type", "title", "status", "code", "retryable", "instance")
    assert {key: refusal[key] for key in same} == {key: shown[key] for key in same}
    assert refusal["detail"].startswith(shown["detail"].removesuffix("…"))


@pytest.mark.slow
def test_the_script_for_curl_runs_and_may_be_repeated(
    desk: Path, variables: dict[str, str], service: LiveService
) -> None:
    run_shell(blocks(QUICKSTART, "sh")[1:2], desk, variables)
    command = [
        str(REPOSITORY / "examples" / "curl" / "merge.sh"),
        "recipe.yaml",
        str(desk / "by-script"),
    ]
    first, again = (
        subprocess.run(
            command, cwd=desk, env=variables, capture_output=True, text=True, check=False
        )
        for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    report = json.loads((desk / "by-script" / "merge_report.json").read_text())
    assert first.stdout.strip() == report["output"]["digest"]
    assert first.stderr.splitlines()[1:] == ["planning", "running", "publishing", "succeeded"]
    assert (again.stdout, again.stderr) == (first.stdout, first.stderr)


def serve_commands() -> Iterator[str]:
    for document in DOCUMENTS:
        for block in blocks(document, "sh"):
            yield from (line for line in block.text.splitlines() if line.startswith(SERVE))


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(set(serve_commands())))
def test_the_service_starts_as_it_is_said(command: str, tmp_path: Path) -> None:
    variables = environment(tmp_path)
    del variables["MERGEYARD_STORAGE_ROOTS"]  # the command names them
    variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command.partition('#')[0]}"],
        cwd=tmp_path,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    guard = threading.Timer(60, process.kill)
    guard.start()
    assert process.stdout is not None
    try:
        url = next(line.split()[-1] for line in process.stdout if "listens on http" in line)
        while httpx.get(f"{url}/readyz", timeout=30).status_code != 200:
            time.sleep(0.05)
        process.terminate()
        assert process.wait() == 0
    finally:
        guard.cancel()
        process.kill()
        process.communicate()


# -- recipes


@pytest.mark.parametrize("block", blocks(RECIPES, "yaml"), ids=lambda block: block.section)
def test_the_recipes_of_the_documents_parse(block: Block) -> None:
    document, *others = yaml.safe_load_all(block.text)
    if others:
        document = {"documents": [document, *others]}
    elif "merge_method" not in document:  # a part of a recipe
        whole = {"merge_method": "ties", "base_model": "base", "models": [{"model": "expert"}]}
        document = whole | document
    assert parse_recipe(document).warnings == ()


@pytest.mark.parametrize("path", EXAMPLE_RECIPES, ids=lambda path: path.stem)
def test_the_example_recipes_parse(path: Path) -> None:
    assert path.read_text().startswith("# ")
    assert parse_recipe(path.read_bytes()).warnings == ()


# -- reference


def test_the_reference_is_current() -> None:
    for name, text in make_reference().items():
        assert (FOLDER / name).read_text() == text, f"{name}: run `python -m docs.generate`"


def test_the_reference_is_complete() -> None:
    methods = (FOLDER / "methods.md").read_text()
    for name, method in all_methods().items():
        assert f"\n## {name}\n" in methods
        for model in (method.parameters, method.expert_parameters):
            for parameter, field in model.model_fields.items():
                assert f"| `{field.alias or parameter}` |" in methods
    settings = (FOLDER / "settings.md").read_text()
    for name in Settings.model_fields:
        assert f"| `{ENV_PREFIX}{name.upper()}` |" in settings
    errors = (FOLDER / "errors.md").read_text()
    for code in KINDS:
        assert f"| `{code}` |" in errors
    events = (FOLDER / "events.md").read_text()
    for event in EventType:
        assert f"| `{event.value}` |" in events
    for state in JobState:
        assert f"`{state.value}`" in events
    for scope in Scope:
        assert f"| `{scope.value}` |" in API.read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in links(document):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), f"{link} in {document.name}"
        if anchor:
            assert anchor in anchors(target), f"{link} in {document.name}"
