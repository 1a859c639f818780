"""What the repository promises about itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.problems import KINDS

ROOT = Path(__file__).parents[2]
ROOMS = ("merging", "workers", "service")
MOST_LINES = {
    **dict.fromkeys((*ROOMS, "examples", "benchmarks", "docs"), 500),
    "tests": 650,  # lists of cases rather than things to be understood as a whole
}

NOT_OF_THE_API = {"unreachable"}
"""Codes of the client: nobody is there to answer."""


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_module_is_too_long_to_read() -> None:
    too_long = [
        (name(path), lines)
        for folder, most in MOST_LINES.items()
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > most
    ]
    assert too_long == []


@pytest.mark.parametrize("command", ["make demo", "make test", "make setup", "make check"])
def test_the_readme_names_the_commands_that_matter(command: str) -> None:
    assert command in (ROOT / "README.md").read_text()


def test_every_make_target_that_is_told_of_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        told = re.findall(r"(?:`|^)make ([\w-]+)", document.read_text(), re.MULTILINE)
        assert set(told) <= targets, name(document)


def test_the_command_of_the_package_is_there() -> None:
    assert 'mergeyard = "service.cli:main"' in (ROOT / "pyproject.toml").read_text()


def codes() -> Iterator[tuple[str, str]]:
    """Every ``code="…"`` and ``default_code = "…"`` in the code, with its file."""
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            text = path.read_text()
            for code in re.findall(r'\b(?:code|default_code)\s*=\s*"([a-z_]+)"', text):
                yield code, name(path)


def test_every_error_code_has_a_status_and_a_title() -> None:
    unknown = {(code, path) for code, path in codes() if code not in KINDS}
    assert {item for item in unknown if item[0] not in NOT_OF_THE_API} == set()
