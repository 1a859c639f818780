"""Reading Markdown as programs: sections, code blocks, links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        section: The ``##`` heading that it stands under; empty before the first.
        language: What follows the fence.
        text: Its lines.
    """

    section: str
    language: str
    text: str


def blocks(document: Path, language: str) -> list[Block]:
    """The code blocks of a document in one language, in order."""
    found = []
    for part in re.split(r"^(?=## )", document.read_text(), flags=re.MULTILINE):
        section = part.partition("\n")[0].removeprefix("## ") if part.startswith("## ") else ""
        found += [Block(section, name, text) for name, text in _FENCE.findall(part)]
    return [block for block in found if block.language == language]


def links(document: Path) -> list[str]:
    """Targets of the links of a document, code blocks left out."""
    return _LINK.findall(_FENCE.sub("", document.read_text()))


def anchors(document: Path) -> set[str]:
    """What can be linked to in a document, as GitHub names its headings."""
    text = _FENCE.sub("", document.read_text())
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in _HEADING.findall(text)
    }
