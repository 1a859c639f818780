"""Real text that is on every machine where Mergeyard is installed, in four kinds.

``english`` is prose out of Python's reference manual and the manuals of cloud services inside
botocore; ``python`` the standard library's sources; ``cpp`` PyTorch's C++ headers; ``json`` the
descriptions of other cloud services, without their prose. Nothing is downloaded.

A document is one file, manual page or description. The SHA-256 of a document decides whether it is
held out: it is never on both sides, and on the same side on every machine that has it.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib.util
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo.errors import DemoError

BASE_KIND = "english"
EXPERT_KINDS = ("python", "cpp", "json")

HELD_OUT_ONE_IN = 8
MIN_DOCUMENT_CHARS = 400
MAX_DOCUMENT_CHARS = 40_000  # so that no single file sets the tone of its kind

# Tests and tables of characters are not what Python code looks like; some systems leave them out.
_NOT_PYTHON_CODE = {"test", "tests", "encodings", "site-packages", "dist-packages", "pydoc_data"}
# One generated header per operator, thousands of near copies: they would be on both sides.
_GENERATED_HEADERS = ("ATen/ops", "ATen/native")
_SERVICES_ONE_IN = 4  # parsing all of them takes longer than it is worth
_MIN_PARAGRAPH_CHARS = 60  # shorter ones are labels


@dataclass(frozen=True, slots=True)
class KindText:
    """The documents of one kind; none is in both parts."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]


Corpus = dict[str, KindText]


def load_corpus(max_chars_per_kind: int) -> Corpus:
    """Every kind, with about ``max_chars_per_kind`` characters to train on."""
    return {kind: split(read(), max_chars_per_kind) for kind, read in _READERS.items()}


def corpus_digest(corpus: Corpus) -> str:
    """SHA-256 over every document, its kind and its side."""
    digest = hashlib.sha256()
    for kind, text in sorted(corpus.items()):
        for side in (text.training, text.held_out):
            digest.update(f"{kind} {len(side)}\n".encode())
            for document in side:
                digest.update(hashlib.sha256(document.encode()).digest())
    return digest.hexdigest()


def split(documents: Iterable[str], max_chars: int) -> KindText:
    """Take documents by the order of their digests, each once, until both sides are full.

    Training is full at ``max_chars``, the held-out part at an eighth of that.
    """
    by_digest: dict[str, str] = {}
    for document in documents:
        if len(document) >= MIN_DOCUMENT_CHARS:
            clipped = document[:MAX_DOCUMENT_CHARS]
            by_digest[hashlib.sha256(clipped.encode()).hexdigest()] = clipped
    training: list[str] = []
    held_out: list[str] = []
    room = {False: max_chars, True: max_chars // HELD_OUT_ONE_IN}
    for digest, document in sorted(by_digest.items()):
        # The head of the digest decides the order, so its tail decides the side.
        is_held_out = int(digest[-8:], 16) % HELD_OUT_ONE_IN == 0
        if room[is_held_out] > 0:
            room[is_held_out] -= len(document)
            (held_out if is_held_out else training).append(document)
    return KindText(tuple(training), tuple(held_out))


def _english_prose() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (str(page) for page in topics.values())
    for description in _cloud_services(0):
        yield "\n".join(_paragraphs(description))


def _python_sources() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        if not _NOT_PYTHON_CODE & set(path.relative_to(root).parts):
            yield _read_text(path)


def _cpp_headers() -> Iterator[str]:
    root = _package_folder("torch") / "include"
    for path in root.rglob("*.h"):
        if not path.relative_to(root).as_posix().startswith(_GENERATED_HEADERS):
            # The build puts one and the same guard round every header.
            lines = _read_text(path).splitlines(keepends=True)
            yield "".join(line for line in lines if "TORCH_STABLE_ONLY" not in line)


def _json_descriptions() -> Iterator[str]:
    for description in _cloud_services(1):  # others than those whose prose is English text
        yield json.dumps(_without_prose(description), indent=2)


def _cloud_services(offset: int) -> Iterator[Any]:
    """botocore's descriptions of every fourth service, from the ``offset``-th on."""
    services = sorted((_package_folder("botocore") / "data").iterdir())
    for service in services[offset::_SERVICES_ONE_IN]:
        if versions := sorted(service.glob("*/service-2.json.gz")):
            with gzip.open(versions[-1], "rt", encoding="utf-8") as file:
                yield json.load(file)


def _paragraphs(node: Any) -> Iterator[str]:
    """What stands under every ``documentation`` key, without mark-up, each paragraph once."""
    seen: set[str] = set()
    stack = [node]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack.extend(reversed(item))
        elif isinstance(item, dict):
            stack.extend(value for key, value in reversed(item.items()) if key != "documentation")
            for paragraph in re.split(r"</?(?:p|ul|ol|li)>", str(item.get("documentation") or "")):
                prose = " ".join(html.unescape(re.sub(r"<[^>]+>", "", paragraph)).split())
                if len(prose) >= _MIN_PARAGRAPH_CHARS and prose not in seen:
                    seen.add(prose)
                    yield prose


def _without_prose(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _without_prose(value) for k, value in node.items() if k != "documentation"}
    if isinstance(node, list):
        return [_without_prose(value) for value in node]
    return node


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise DemoError(f"The demo needs the package {name!r}; run 'make setup'.")
    return Path(spec.origin).parent


_READERS: dict[str, Callable[[], Iterator[str]]] = {
    "english": _english_prose,
    "python": _python_sources,
    "cpp": _cpp_headers,
    "json": _json_descriptions,
}
