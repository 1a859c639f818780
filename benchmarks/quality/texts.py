"""Real texts with labels that are on any machine: in packages installed here, or in pinned wheels.

A reader yields :class:`Sample`; ``group`` is what must not be on both sides of a split (the file
that a line is from), by default the text itself. Labels are words: the head of a task is made of
them.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import json
import re
import sysconfig
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.wheels import Wheels


@dataclass(frozen=True, slots=True)
class Sample:
    """A text, what it is, and what it must not be separated from."""

    text: str
    label: str
    group: str = ""


Reader = Callable[[Wheels], Iterator[Sample]]

_SERVICES = {
    "cloudfront": ("content delivery", r"cloud ?front"),
    "cognito-idp": ("sign-up of users", r"cognito"),
    "connect": ("contact centre", r"connect"),
    "ec2": ("virtual machines and networks", r"ec2|elastic compute cloud"),
    "glue": ("data catalogue and jobs", r"glue"),
    "iam": ("users, roles and policies", r"iam|identity and access management"),
    "iot": ("devices and things", r"iot|internet of things"),
    "quicksight": ("dashboards and analyses", r"quick ?suite|quick ?sight|quick"),
    "rds": ("relational databases", r"rds|aurora"),
    "sagemaker": ("machine learning", r"sage ?maker"),
}
"""Names in botocore, what they are for, and how they call themselves."""


def cloud_services(wheels: Wheels) -> Iterator[Sample]:
    """Which service an operation belongs to, of whose description the name is taken out."""
    del wheels
    for name, (label, names) in _SERVICES.items():
        own_name = re.compile(rf"\b(?:aws|amazon|{names})\b\s*", re.IGNORECASE)
        for operation in _service(name)["operations"].values():
            if text := _prose(operation.get("documentation")):
                yield Sample(own_name.sub("", text), label)


_TYPES = {
    "boolean": "yes or no",
    "integer": "number",
    "list": "list",
    "map": "map of keys to values",
    "string": "string",
    "structure": "structure",
    "timestamp": "date and time",
}


def field_types(wheels: Wheels) -> Iterator[Sample]:
    """Which type a field has that is described so."""
    del wheels
    for path in sorted((_package("botocore") / "data").iterdir())[::4]:
        if (service := _service(path.name)) is None:
            continue
        for shape in service["shapes"].values():
            for member in shape.get("members", {}).values():
                label = _TYPES.get(service["shapes"][member["shape"]]["type"])
                text = _prose(member.get("documentation"))
                if label and text:
                    yield Sample(text, label)


_LANGUAGES = {
    "da": "Danish", "de": "German", "es": "Spanish", "fi": "Finnish", "fr": "French",
    "id": "Indonesian", "it": "Italian", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese",
    "sv": "Swedish", "tr": "Turkish",
}  # fmt: skip
_MESSAGE = re.compile(r'^msgid "([^"]+)"\nmsgstr "([^"]+)"$', re.MULTILINE)


def languages(wheels: Wheels) -> Iterator[Sample]:
    """Which language a message of Django is in."""
    for code, label in _LANGUAGES.items():
        for _, content in wheels.read("django", f"*/{code}/LC_MESSAGES/django.po"):
            for original, translated in _MESSAGE.findall(content.decode()):
                if original != translated:
                    yield Sample(re.sub(r"%\(?\w*\)?\w|[{}\\]", " ", translated), label)


def code(wheels: Wheels) -> Iterator[Sample]:
    """Which language two lines of source are in; the lines of a file stay together."""
    sources = {
        "Python": _files(Path(sysconfig.get_path("stdlib")), "*.py", "asyncio/*.py", "email/*.py"),
        "C++": _files(_package("torch") / "include", "c10/**/*.h", "ATen/core/*.h"),
        "Fortran": _files(_package("numpy"), "**/*.f90", "**/*.f"),
        "CMake": _files(_package("torch") / "share", "**/*.cmake"),
        "JavaScript": wheels.read("django", "*/admin/js/*.js"),
        "CSS": wheels.read("django", "*.css"),
        "HTML template": wheels.read("django", "*.html"),
    }
    for label, files in sources.items():
        for name, content in files:
            if ".min." in name or len(content) > _MAX_SOURCE_BYTES:
                continue
            lines = [line.strip() for line in content.decode(errors="replace").splitlines()]
            lines = [line for line in lines if len(line) > _MIN_LINE_CHARS]
            pairs = list(zip(lines[::2], lines[1::2], strict=False))
            for first, second in pairs[:: max(1, len(pairs) // _MAX_PAIRS)]:
                yield Sample(f"{first} {second}", label, group=name)


_MAX_SOURCE_BYTES = 60_000
_MIN_LINE_CHARS = 6
_MAX_PAIRS = 40  # of one file

_SCRIPTS = (
    "ARABIC", "CANADIAN SYLLABICS", "CHEROKEE", "CYRILLIC", "DEVANAGARI", "ETHIOPIC", "GREEK",
    "HEBREW", "LATIN", "MYANMAR", "TIBETAN", "VAI",
)  # fmt: skip


def scripts(wheels: Wheels) -> Iterator[Sample]:
    """Which script a character is of, from its Unicode name without the script's."""
    del wheels
    for number in range(0x20000):
        name = unicodedata.name(chr(number), "")
        for script in _SCRIPTS:
            if name.startswith(f"{script} "):
                yield Sample(name.removeprefix(script).strip().lower(), script.title())


def sentiments(wheels: Wheels) -> Iterator[Sample]:
    """Whether an adjective in one of its senses says something good or bad."""
    ((_, content),) = wheels.read("textblob", "*/en-sentiment.xml")
    for word in ET.fromstring(content).iter("word"):
        polarity = float(word.attrib["polarity"])
        sense = word.get("sense")
        if sense and (abs(polarity) <= 0.05 or abs(polarity) >= 0.25):
            label = "neutral" if abs(polarity) <= 0.05 else "good" if polarity > 0 else "bad"
            yield Sample(f"{word.attrib['form']}: {sense}", label, group=word.attrib["form"])


_LICENCES = {
    "Permissive", "Copyleft", "Copyleft Limited", "Proprietary Free", "Commercial",
    "Source-available",
}  # fmt: skip


def licences(wheels: Wheels) -> Iterator[Sample]:
    """Which category ScanCode puts a licence in, from its name."""
    ((_, content),) = wheels.read("license_expression", "*/scancode-licensedb-index.json")
    for entry in json.loads(content):
        if entry["category"] in _LICENCES:
            name = re.sub(r"[-_.\d]+", " ", entry["license_key"]).strip()
            yield Sample(name, entry["category"])


def places(wheels: Wheels) -> Iterator[Sample]:
    """Which country a province, district or town is in."""
    ((_, countries),) = wheels.read("pycountry", "*/databases/iso3166-1.json")
    names = {entry["alpha_2"]: entry["name"] for entry in json.loads(countries)["3166-1"]}
    ((_, content),) = wheels.read("pycountry", "*/databases/iso3166-2.json")
    for entry in json.loads(content)["3166-2"]:
        if (country := entry["code"][:2]) in _COUNTRIES:
            yield Sample(entry["name"], names[country])


_COUNTRIES = {"AZ", "ES", "FR", "GB", "IT", "LV", "PH", "RU", "SI", "TH", "TR", "UG", "VN"}

READERS: dict[str, Reader] = {
    "service": cloud_services,
    "type": field_types,
    "language": languages,
    "code": code,
    "script": scripts,
    "sentiment": sentiments,
    "licence": licences,
    "place": places,
}


def _service(name: str) -> Any:
    versions = sorted((_package("botocore") / "data" / name).glob("*/service-2.json.gz"))
    if not versions:
        return None
    with gzip.open(versions[-1], "rt", encoding="utf-8") as file:
        return json.load(file)


def _prose(text: str | None) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text or "")).split())


def _files(root: Path, *patterns: str) -> Iterator[tuple[str, bytes]]:
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            yield path.relative_to(root).as_posix(), path.read_bytes()


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The benchmark reads texts of the package {name!r}: run 'make setup'.")
    return Path(spec.origin).parent
