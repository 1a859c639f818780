"""``python -m tests.parity``: the same merges by other projects and by this one, compared.

mergekit gets the same recipes, FusionBench, which has none, calls of its functions. Each is
installed in an environment of its own (``.cache``). Models are tiny and made here. The
exit status is 1 if a result is further off than its case allows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from merging.checkpoint.vocabulary import read_tokenizer
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.rebuild import plan_rebuild
from merging.recipe import parse_recipe
from merging.report import REPORT_NAME
from merging.storage.router import open_storage
from merging.task_masks import REPORT_KEY
from tests.parity.cases import CASES, VOCABULARIES, Case
from tests.parity.fusion_bench_cases import CASES as FUSION_BENCH_CASES
from tests.support.adapters import factors, write_adapter
from tests.support.checkpoints import Family, make_family
from tests.support.composed import write_t5
from tests.support.environments import plain_environment, python_with
from tests.support.merges import load_merged
from tests.support.tokenizers import write_model

VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
NUM_ADAPTERS = 2
_TORCH = "torch==2.13.0+cpu"


@dataclass(frozen=True)
class Side:
    """Another project.

    Attributes:
        package: On the package index.
        version: Of it.
        before: Requirements that are installed before it.
        script: What runs in its environment.
        cases: What is compared.
    """

    package: str
    version: str
    before: tuple[str, ...]
    script: str
    cases: Sequence[Case]


SIDES = (
    Side("mergekit", "0.1.5", (_TORCH,), "mergekit_side.py", CASES),
    # Some of its modules do not load with later versions of transformers.
    Side(
        "fusion-bench",
        "0.2.33",
        (_TORCH, "transformers==5.0.0"),
        "fusion_bench_side.py",
        FUSION_BENCH_CASES,
    ),
)


def main() -> int:
    """Run all cases and print tables; the exit status."""
    console = Console(width=100)
    return max([_compare(side, console) for side in SIDES])


def _compare(side: Side, console: Console) -> int:
    try:
        python = python_with(side.package, side.version, *side.before)
    except pytest.skip.Exception as reason:
        console.print(f"{side.package} {side.version} is needed for the comparison: {reason}")
        return 1
    columns = ("case", "difference", "entries with the same bits", "allowed", "")
    table = Table(*columns, title=f"{side.package} {side.version}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        family = make_family(folder / "models", rms=2e-3)
        for number, (words, special) in enumerate(VOCABULARIES):
            write_model(folder / f"models/v{number}", words, special, seed=number)
            write_t5(folder / f"models/t{number}", seed=number)
        _write_adapters(folder / "models", family)
        told = _merge_theirs(python, side, family, folder)
        results = [
            _judge(number, case, family, folder, text)
            for number, (case, text) in enumerate(zip(side.cases, told, strict=True))
        ]
    for case, (difference, same, fault) in zip(side.cases, results, strict=True):
        allowed = "same bits" if case.tolerance == 0 else f"{case.tolerance:.0e}"
        table.add_row(case.name, f"{difference:.1e}", f"{100 * same:.1f} %", allowed, fault or "ok")
    console.print(table)
    return int(any(fault for _, _, fault in results))


def _write_adapters(folder: Path, family: Family) -> None:
    """Two adapters of the base model, on projections of attention and MLP."""
    for number in range(NUM_ADAPTERS):
        generator = torch.Generator().manual_seed(number)
        tensors: dict[str, torch.Tensor] = {}
        for module in ("self_attn.q_proj", "mlp.up_proj"):
            name = f"model.layers.{number}.{module}"
            shape = family.base_state[f"{name}.weight"].shape
            tensors |= factors(name, shape[0], shape[1], 4, generator)
        write_adapter(folder / f"a{number}", tensors, target_modules=["q_proj", "up_proj"])


def _merge_theirs(python: Path, side: Side, family: Family, folder: Path) -> list[str]:
    models = [str(path) for path in (family.base, *family.experts)]
    jobs = [
        {"output": str(folder / f"theirs-{number}")}
        | (
            {"call": {**case.call, "models": models}}
            if case.call
            else {"recipe": _with_models(case.recipe, family)}
        )
        for number, case in enumerate(side.cases)
    ]
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    script = Path(__file__).with_name(side.script)
    done = subprocess.run(
        [str(python), str(script), str(file)],
        env=plain_environment(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=True,
    )
    return [line for line in done.stdout.splitlines() if line.strip()]


def _judge(
    number: int, case: Case, family: Family, folder: Path, told: str
) -> tuple[float, float, str]:
    """The largest difference of a tensor, the share of equal entries, and what is wrong."""
    if told != "ok":
        return 0.0, 0.0, f"theirs: {told}"
    theirs = load_merged(folder / f"theirs-{number}")
    ours = _merge_ours(_with_models(case.recipe, family), folder / f"ours-{number}", case.task)
    if case.by_token:
        order = _order(folder / f"ours-{number}", folder / f"theirs-{number}")
        theirs |= {name: theirs[name][order] for name in VOCABULARY_TENSORS}
    if ours.keys() != theirs.keys():
        return 0.0, 0.0, f"tensors differ: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    worst, equal, flipped, total = 0.0, 0, 0, 0
    for name, expected in theirs.items():
        found = ours[name]
        base = family.base_state.get(name)
        if base is None or base.shape != expected.shape:
            base = torch.zeros_like(expected)
        change = (expected - base).double().norm()
        rounding = torch.finfo(torch.float32).eps * expected.double().norm()
        off = (found - expected).double()
        limit = 10 * max(case.tolerance, 1e-7) * float((expected - base).abs().max())
        is_flipped = off.abs() > limit if case.flipped else torch.zeros_like(off, dtype=torch.bool)
        flipped += int(is_flipped.sum())
        beyond = (off[~is_flipped].norm() - (rounding if case.tolerance else 0)).clamp(min=0)
        worst = max(worst, float(beyond / change.clamp(min=1e-12)))
        equal += int((found == expected).sum())
        total += found.numel()
    fault = ""
    if worst > case.tolerance or flipped > case.flipped * total:
        fault = f"too far off ({flipped} of {total} entries chosen otherwise)"
    return worst, equal / total, fault


def _order(ours: Path, theirs: Path) -> list[int]:
    """Numbers in their tokenizer of the tokens of ours, in our order, and padding after these."""
    storage = open_storage()
    own, other = (
        read_tokenizer(storage, uri, storage.stat(uri).version).vocabulary
        for uri in (str(folder / "tokenizer.json") for folder in (ours, theirs))
    )
    order = [other[token] for token in sorted(own, key=own.__getitem__)]
    rows = load_merged(theirs)[VOCABULARY_TENSORS[0]].shape[0]
    return [*order, *range(len(order), rows)]


def _merge_ours(
    recipe: dict[str, Any], output: Path, task: int | None = None
) -> dict[str, torch.Tensor]:
    storage, options = open_storage(), MergeOptions()
    run_plan(make_plan(parse_recipe(recipe), storage, options, str(output)), storage)
    if task is None:
        return load_merged(output)
    file, own = output / REPORT_NAME, output.with_name(f"{output.name}-own")
    report = json.loads(file.read_text())
    report[REPORT_KEY][task]["rescaler"] = 1.0
    file.write_text(json.dumps(report))
    run_plan(plan_rebuild(str(output), str(task + 1), storage, options, str(own)), storage)
    return load_merged(own)


def _with_models(recipe: dict[str, Any], family: Family) -> dict[str, Any]:
    names = [f"{kind}{n}" for kind in "VT" for n in range(len(VOCABULARIES))]
    names += [f"A{number}" for number in range(NUM_ADAPTERS)]
    places = {name: family.base.parent / name.lower() for name in names}
    places |= {"BASE": family.base} | {f"E{n}": path for n, path in enumerate(family.experts)}
    text = json.dumps(recipe)
    for name, path in places.items():
        text = text.replace(f'"{name}"', json.dumps(str(path)))
    found: dict[str, Any] = json.loads(text)
    return found


if __name__ == "__main__":
    sys.exit(main())
