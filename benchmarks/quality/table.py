"""The record as Markdown: the whole table for docs/quality.md, a short one for README.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.quality.recipes import TUNED

_ROOT = Path(__file__).parents[2]
_BEGIN, _END = "<!-- quality: begin -->\n", "<!-- quality: end -->"
_SHORT = (
    "iso_wudi", "iso_c", "tsv_m", "swudi_a", "wudi", "lot", "regmean", "cat", "ties",
    "task_arithmetic", "linear",
)  # fmt: skip

Figures = Mapping[str, Any]


def write_documents(record: Path) -> None:
    """Put the tables of a record in their places in README.md and docs/quality.md."""
    figures = json.loads(record.read_text(encoding="utf-8"))["figures"]
    for path, text in documents(figures).items():
        before, begin, rest = path.read_text(encoding="utf-8").partition(_BEGIN)
        _, end, after = rest.partition(_END)
        path.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")


def written_table(document: Path) -> str:
    """What stands between the marks of a document."""
    return document.read_text(encoding="utf-8").partition(_BEGIN)[2].partition(_END)[0]


def documents(figures: Figures) -> dict[Path, str]:
    """What belongs between the marks, by document."""
    return {
        _ROOT / "README.md": short_table(figures),
        _ROOT / "docs" / "quality.md": whole_table(figures) + excluded(figures),
    }


def short_table(figures: Figures) -> str:
    """The best-known methods, best first."""
    chosen = [name for name in _ranked(figures) if name in _SHORT]
    rows = [[f"`{name}`", *_kept(figures, name), *_costs(figures, name)] for name in chosen]
    rows.append(["the pretrained encoder", _base(figures), "", "", "", ""])
    return _markdown(["method", "% kept", "% kept, scale tuned", *_COST_HEADINGS], rows)


def whole_table(figures: Figures) -> str:
    """Every method, best first, with its accuracy on every task; then what it is compared with."""
    tasks = list(figures["tasks"])
    rows = [
        [
            f"`{name}`",
            *_kept(figures, name),
            *_percents(figures, tasks, lambda seed, name=name: seed["methods"][name]["accuracies"]),
            *_costs(figures, name),
        ]
        for name in _ranked(figures)
    ]
    probe = _percents(figures, tasks, lambda _: figures["linear_probe"])
    rows += [
        ["experts", "100", "", *_percents(figures, tasks, lambda seed: seed["experts"])],
        ["pretrained", _base(figures), "", *_percents(figures, tasks, lambda seed: seed["base"])],
        ["pretrained, trained heads", "", "", *probe],
    ]
    headings = ["method", "% kept", "scale tuned", *tasks, *_COST_HEADINGS]
    return _markdown(headings, [row + [""] * (len(headings) - len(row)) for row in rows])


def excluded(figures: Figures) -> str:
    """The methods without a row, and why."""
    first = next(iter(figures["seeds"].values()))["methods"]
    reasons = [f"- `{name}`: {row['excluded']}" for name, row in first.items() if "excluded" in row]
    return "\nNot in the table, with what planning says:\n\n" + "\n".join(reasons) + "\n"


_COST_HEADINGS = ["CPU s", "GB read", "samples"]


def _ranked(figures: Figures) -> list[str]:
    first = next(iter(figures["seeds"].values()))["methods"]
    measured = [name for name, row in first.items() if "kept" in row]
    return sorted(measured, key=lambda name: -fmean(_over_seeds(figures, name, "kept")))


def _over_seeds(figures: Figures, name: str, key: str) -> list[float]:
    return [seed["methods"][name][key] for seed in figures["seeds"].values()]


def _kept(figures: Figures, name: str) -> list[str]:
    """By default, and tuned with the values that were chosen."""
    default = _spread(_over_seeds(figures, name, "kept"))
    tuned = [seed["methods"][name].get("tuned") for seed in figures["seeds"].values()]
    if not all(tuned):
        return [default, ""]
    values = sorted({f"{row['parameters'][TUNED[name].key]:g}" for row in tuned}, key=float)
    return [default, f"{_spread([row['kept'] for row in tuned])} ({', '.join(values)})"]


def _base(figures: Figures) -> str:
    return _spread(
        [
            100 * fmean(seed["base"][task] / seed["experts"][task] for task in figures["tasks"])
            for seed in figures["seeds"].values()
        ]
    )


def _costs(figures: Figures, name: str) -> list[str]:
    return [
        f"{fmean(_over_seeds(figures, name, 'cpu_seconds')):.0f}",
        f"{_over_seeds(figures, name, 'bytes_read')[0] / 1e9:.1f}",
        str(_over_seeds(figures, name, "samples")[0] or ""),
    ]


def _percents(
    figures: Figures, tasks: Iterable[str], accuracies: Callable[[Any], Mapping[str, float]]
) -> list[str]:
    """Mean accuracies over seeds, by task."""
    seeds = figures["seeds"].values()
    return [f"{100 * fmean(accuracies(seed)[task] for seed in seeds):.0f}" for task in tasks]


def _spread(values: Sequence[float]) -> str:
    """The mean, and half of the range where there are several."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{fmean(values):.1f} ± {(max(values) - min(values)) / 2:.1f}"


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---", *["--:"] * (len(headings) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
