"""Tasks: samples cut into training, validation and test parts that share nothing."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from benchmarks.quality.texts import READERS, Sample
from benchmarks.quality.wheels import Wheels

MAX_CHARS = 120
_MIN_CHARS = 3
_SHARES = {"training": 0.75, "validation": 0.08, "test": 0.17}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many samples each part has at the most."""

    training: int = 2400
    validation: int = 96
    test: int = 192
    per_label: int = 500


@dataclass(frozen=True)
class Task:
    """Samples of one kind in three parts; every text is in one of them, once.

    Attributes:
        name: One word.
        labels: What a sample can be, in the order of the head's rows.
        training: To train on, and to calibrate merges with.
        validation: To choose scales with.
        test: To report, and for nothing else.
    """

    name: str
    labels: tuple[str, ...]
    training: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over all texts, labels and parts."""
        text = repr((self.name, self.labels, self.training, self.validation, self.test))
        return hashlib.sha256(text.encode()).hexdigest()


def load_tasks(wheels: Wheels, sizes: Sizes) -> list[Task]:
    """Every task, the same on every machine that has the same packages."""
    return [make_task(name, read(wheels), sizes) for name, read in READERS.items()]


def make_task(name: str, samples: Iterable[Sample], sizes: Sizes) -> Task:
    """Cut samples into parts, by the digests of their groups.

    Texts that differ in nothing but case, digits and punctuation are one; where these have several
    labels, none of them is taken.
    """
    parts: dict[str, list[Sample]] = {part: [] for part in _SHARES}
    for sample in _distinct(samples):
        parts[_part(sample.group)].append(sample)
    kept = {
        part: tuple(_balanced(parts[part], round(sizes.per_label * share), getattr(sizes, part)))
        for part, share in _SHARES.items()
    }
    labels = sorted({sample.label for sample in kept["training"]})
    return Task(name, tuple(labels), **kept)


def _distinct(samples: Iterable[Sample]) -> list[Sample]:
    """Each text once, shortened, in the order of digests."""
    found: dict[str, Sample] = {}
    labels: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        text = " ".join(sample.text.split())[:MAX_CHARS]
        plain = re.sub(r"[\W\d_]+", " ", text.lower()).strip()
        if len(plain) >= _MIN_CHARS:
            found.setdefault(plain, Sample(text, sample.label, sample.group or plain))
            labels[plain].add(sample.label)
    kept = [sample for plain, sample in found.items() if len(labels[plain]) == 1]
    return sorted(kept, key=lambda sample: _digest(sample.text))


def _part(group: str) -> str:
    position = int(_digest(group), 16) / 2**256
    if position < _SHARES["training"]:
        return "training"
    return "validation" if position < 1 - _SHARES["test"] else "test"


def _balanced(samples: Iterable[Sample], per_label: int, total: int) -> Iterator[Sample]:
    """The first ones, up to so many of a label and in total."""
    count: Counter[str] = Counter()
    for sample in samples:
        if count[sample.label] < per_label and count.total() < total:
            count[sample.label] += 1
            yield sample


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
