"""What merges cost here and with mergekit: processor time, wall time and memory.

    python -m benchmarks merge [--methods linear ties …] [--rounds N] [--planning] [--json FILE]

Both merge the same random bfloat16 models by the same recipes, each as a process of its own, in
turns, with the same number of threads and all inputs in the page cache; the cheapest of a few
rounds counts. Both also merge a tiny model, which shows what starting takes. mergekit runs in an
environment of its own (`.cache`). How fast this machine copies as many bytes as `linear` reads and
writes is measured in the same run; and how long we plan for as many tensors as DeepSeek V3 has.
Takes 4.5 GB of room and about 15 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.processes import Cost, run_measured
from benchmarks.records import conditions, write_record
from benchmarks.sparse_models import Shape, write_random_family, write_sparse_mixture
from tests.parity.__main__ import SIDES
from tests.support.environments import plain_environment, python_with

NUM_EXPERTS = 3
TINY = Shape(hidden=256, intermediate=512, layers=1, key_value=256, vocab=512)
WEIGHTS = (0.3, 0.9, 0.5)
PLANNED_LAYERS = (15, 59)
_CHUNK = 16 << 20
_REPOSITORY = Path(__file__).parent.parent


def _weighted(**parameters: float) -> list[dict[str, float]]:
    return [{"weight": weight, **parameters} for weight in WEIGHTS]


RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"experts": _weighted(), "base": False},
    "task_arithmetic": {"experts": _weighted()},
    "slerp": {"experts": [{}], "parameters": {"t": 0.4}, "base_listed": True},
    "nuslerp": {"experts": _weighted()[:2], "base": False},
    "model_stock": {"experts": [{}] * 3},
    "karcher": {"experts": [{}] * 3, "base": False},
    "dare_ties": {"experts": _weighted(density=0.5)},
    "ties": {"experts": _weighted(density=0.5)},
    "breadcrumbs": {"experts": _weighted(density=0.9)},
    "della": {"experts": _weighted(density=0.5)},
    "sce": {"experts": [{}] * 3, "parameters": {"select_topk": 0.5}},
}
"""In the schema that both have: parameters of the experts, whether there is a base, and more."""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and record."""
    options = _parse(arguments)
    with tempfile.TemporaryDirectory(prefix="merge-", dir=options.folder) as name:
        figures = Comparison(options, Path(name)).run()
    where = conditions(torch.device("cpu"))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(
        f"{where['processor']}, {options.threads} threads, {figures['model_bytes']} bytes"
    )
    console.print(_table(figures))
    for planned in figures["planning"] or ():
        console.print(f"planning {planned['tensors']} tensors: {planned['cpu_seconds']:.1f} s")
    if floor := figures["floor"]:
        console.print(
            f"copying what linear reads and writes: {floor['cpu_seconds']:.1f} s of processor time,"
            f" {100 * floor['share_of_cpu']:.0f} % of the merge's; {floor['wall_seconds']:.1f} s on"
            f" the wall, {100 * floor['share_of_wall']:.0f} %"
        )
    if options.json:
        write_record(options.json, torch.device("cpu"), figures)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--layers", type=int, default=6, help="of the models; 0.09 GB each (6)")
    parser.add_argument("--vocab", type=int, default=32000, help="rows of the embedding (32000)")
    parser.add_argument("--rounds", type=int, default=1, help="turns, the cheapest counts (1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of both (1)")
    parser.add_argument("--budget", default="1GiB", help="our memory budget (1GiB)")
    parser.add_argument("--planning", action="store_true", help="also plan 45,000 tensors")
    parser.add_argument("--ours-only", action="store_true", help="leave mergekit out")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="write figures and conditions to this file")
    return parser.parse_args(arguments)


class Comparison:
    """Runs both programs on the same models.

    Args:
        options: Of the command line.
        folder: For models and results.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._folder = folder
        self._theirs = None if options.ours_only else _mergekit()

    def run(self) -> dict[str, Any]:
        """All figures."""
        options = self._options
        shape = Shape(2048, 5632, options.layers, 512, options.vocab)
        base, experts = write_random_family(self._folder / "models", shape, NUM_EXPERTS)
        size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        tiny = write_random_family(self._folder / "tiny", TINY, NUM_EXPERTS)
        starting = self._compare("linear", *tiny)
        methods = {name: self._compare(name, base, experts) for name in options.methods}
        for name, sides in methods.items():
            sides["bytes"] = {"read": size * _num_inputs(name), "written": size}
        return {
            "model_bytes": size,
            "experts": NUM_EXPERTS,
            "threads": options.threads,
            "memory_budget": options.budget,
            "rounds": options.rounds,
            "starting": starting,
            "methods": methods,
            "planning": self._plan() if options.planning else None,
            "floor": self._floor(experts, methods["linear"]) if "linear" in methods else None,
        }

    def _compare(self, name: str, base: Path, experts: Sequence[Path]) -> dict[str, Any]:
        recipe = self._folder / "recipe.yaml"
        recipe.write_text(json.dumps(make_recipe(name, base, experts)))
        sides: dict[str, Callable[[], Cost]] = {"ours": lambda: self._merge_here(recipe)}
        if self._theirs:
            sides["theirs"] = lambda: self._merge_there(recipe)
        found: dict[str, list[Cost]] = {side: [] for side in sides}
        for _ in range(self._options.rounds):
            for side, merge in sides.items():
                found[side].append(merge())
                shutil.rmtree(self._folder / "merged")
                cost = found[side][-1]
                print(
                    f"{name} {side}: {cost.cpu_seconds:.1f} s of processor time,"
                    f" {cost.wall_seconds:.1f} s, {cost.peak_bytes / 1e6:.0f} MB",
                    file=sys.stderr,
                )
        return {side: asdict(_cheapest(costs)) for side, costs in found.items()}

    def _merge_here(self, recipe: Path) -> Cost:
        options = self._options
        command = [sys.executable, "-m", "service.cli", "merge", recipe]
        command += ["--output", self._folder / "merged", "--device", "cpu"]
        command += ["--threads", options.threads, "--memory-budget", options.budget]
        environment = plain_environment(
            OMP_NUM_THREADS=str(options.threads), XDG_CACHE_HOME=str(self._folder / "cache")
        )
        return run_measured(command, environment, _REPOSITORY)

    def _merge_there(self, recipe: Path) -> Cost:
        assert self._theirs
        threads = str(self._options.threads)
        command = [self._theirs.with_name("mergekit-yaml"), recipe, self._folder / "merged"]
        command += ["--quiet", "--no-write-model-card", "--no-copy-tokenizer", "-j", threads]
        environment = plain_environment(HF_HUB_OFFLINE="1", OMP_NUM_THREADS=threads)
        return run_measured(command, environment, self._folder)

    def _plan(self) -> list[dict[str, float]]:
        """Processor time of planning two mixtures of experts, one with four times the tensors."""
        found = []
        for layers in PLANNED_LAYERS:
            folder = self._folder / f"mixture-{layers}"
            models = [write_sparse_mixture(folder / name, layers) for name in ("base", "a", "b")]
            recipe = self._folder / "recipe.yaml"
            document = {
                "merge_method": "ties",
                "base_model": str(models[0]),
                "models": [{"model": str(model)} for model in models[1:]],
            }
            recipe.write_text(json.dumps(document))
            command = [sys.executable, "-m", "service.cli", "plan", recipe, "--json"]
            command += ["--output", self._folder / "planned"]
            cost = run_measured(command, plain_environment(), _REPOSITORY)
            found.append({"tensors": 768 * layers, "cpu_seconds": cost.cpu_seconds})
        return found

    def _floor(self, experts: Sequence[Path], linear: dict[str, Any]) -> dict[str, float]:
        """Reading the experts and writing one of them, and what share that is of a merge."""
        copies = [copy_bytes(experts, self._folder / "copy") for _ in range(3)]
        cpu, wall = (min(one) for one in zip(*copies, strict=True))
        return {
            "cpu_seconds": cpu,
            "wall_seconds": wall,
            "share_of_cpu": cpu / linear["ours"]["cpu_seconds"],
            "share_of_wall": wall / linear["ours"]["wall_seconds"],
        }


def _mergekit() -> Path:
    """The Python of its environment."""
    side = next(side for side in SIDES if side.package == "mergekit")
    return python_with(side.package, side.version, *side.before)


def make_recipe(name: str, base: Path, experts: Sequence[Path]) -> dict[str, Any]:
    """What both merge."""
    about = RECIPES[name]
    listed: list[dict[str, Any]] = [{"model": str(base)}] if about.get("base_listed") else []
    listed += [
        {"model": str(expert), "parameters": parameters}
        for expert, parameters in zip(experts, about["experts"], strict=False)
    ]
    recipe = {"merge_method": name, "models": listed, "dtype": "bfloat16"}
    if about.get("base", True):
        recipe["base_model"] = str(base)
    return recipe | ({"parameters": about["parameters"]} if "parameters" in about else {})


def copy_bytes(experts: Sequence[Path], target: Path) -> tuple[float, float]:
    """Processor and wall seconds of reading all experts, and of writing as much as one has."""
    buffer = memoryview(bytearray(_CHUNK))
    begin, cpu = time.monotonic(), _own_cpu()
    with target.open("wb", buffering=0) as written:
        for number, expert in enumerate(experts):
            for path in sorted(expert.glob("*.safetensors")):
                with path.open("rb", buffering=0) as file:
                    while count := file.readinto(buffer):
                        if number == 0:
                            written.write(buffer[:count])
        os.fsync(written.fileno())
    seconds = _own_cpu() - cpu, time.monotonic() - begin
    target.unlink()
    return seconds


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _num_inputs(name: str) -> int:
    about = RECIPES[name]
    return len(about["experts"]) + about.get("base", True)


def _cheapest(costs: Sequence[Cost]) -> Cost:
    """The least of each figure: what others on the machine do can only add to it."""
    return Cost(*(min(values) for values in zip(*(asdict(c).values() for c in costs), strict=True)))


def _table(figures: dict[str, Any]) -> Table:
    table = Table("method", "", "CPU s", "ratio", "wall s", "ratio", "peak MB", "ratio", "MB/CPU s")
    for name, sides in {"(starting)": figures["starting"], **figures["methods"]}.items():
        ours, theirs = sides["ours"], sides.get("theirs")
        for side, cost in (("ours", ours), ("mergekit", theirs)):
            if cost is None:
                continue
            cells = [name if side == "ours" else "", side]
            for key, scale in (("cpu_seconds", 1), ("wall_seconds", 1), ("peak_bytes", 1e6)):
                cells.append(f"{cost[key] / scale:.{1 if scale == 1 else 0}f}")
                ratio = f"{theirs[key] / ours[key]:.1f}×" if theirs and side == "ours" else ""
                cells.append(ratio)
            moved = sum(sides.get("bytes", {}).values())
            cells.append(f"{moved / cost['cpu_seconds'] / 1e6:.0f}" if moved else "")
            table.add_row(*cells)
    return table


if __name__ == "__main__":
    main()
