"""``python -m tests.parity``: the same recipes through mergekit and through this project, compared.

mergekit is installed in an environment of its own (``.cache``). Models are tiny and made here. The
exit status is 1 if a result is further off than its case allows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
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
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.parity.cases import CASES, VOCABULARIES, Case
from tests.support.checkpoints import Family, make_family
from tests.support.composed import write_t5
from tests.support.environments import plain_environment, python_with
from tests.support.merges import load_merged
from tests.support.tokenizers import write_model

VERSION = "0.1.5"
VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
_TORCH = "torch==2.13.0+cpu"


def main() -> int:
    """Run all cases and print a table; the exit status."""
    console = Console(width=100)
    try:
        python = python_with("mergekit", VERSION, _TORCH)
    except pytest.skip.Exception as reason:
        console.print(f"mergekit {VERSION} is needed for the comparison: {reason}")
        return 1
    table = Table("case", "difference", "entries with the same bits", "allowed", "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        family = make_family(folder / "models", rms=2e-3)
        for number, (words, special) in enumerate(VOCABULARIES):
            write_model(folder / f"models/v{number}", words, special, seed=number)
            write_t5(folder / f"models/t{number}", seed=number)
        told = _merge_theirs(python, family, folder)
        results = [
            _judge(case, family, folder, text) for case, text in zip(CASES, told, strict=True)
        ]
    for case, (difference, same, fault) in zip(CASES, results, strict=True):
        allowed = "same bits" if case.tolerance == 0 else f"{case.tolerance:.0e}"
        table.add_row(case.name, f"{difference:.1e}", f"{100 * same:.1f} %", allowed, fault or "ok")
    console.print(table)
    return int(any(fault for _, _, fault in results))


def _merge_theirs(python: Path, family: Family, folder: Path) -> list[str]:
    jobs = [
        {"recipe": _with_models(case.recipe, family), "output": str(folder / f"theirs-{number}")}
        for number, case in enumerate(CASES)
    ]
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    script = Path(__file__).with_name("mergekit_side.py")
    done = subprocess.run(
        [str(python), str(script), str(file)],
        env=plain_environment(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=True,
    )
    return [line for line in done.stdout.splitlines() if line.strip()]


def _judge(case: Case, family: Family, folder: Path, told: str) -> tuple[float, float, str]:
    """The largest difference of a tensor, the share of equal entries, and what is wrong."""
    number = CASES.index(case)
    if told != "ok":
        return 0.0, 0.0, f"mergekit: {told}"
    theirs = load_merged(folder / f"theirs-{number}")
    ours = _merge_ours(_with_models(case.recipe, family), folder / f"ours-{number}")
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


def _merge_ours(recipe: dict[str, Any], output: Path) -> dict[str, torch.Tensor]:
    storage = open_storage()
    run_plan(make_plan(parse_recipe(recipe), storage, MergeOptions(), str(output)), storage)
    return load_merged(output)


def _with_models(recipe: dict[str, Any], family: Family) -> dict[str, Any]:
    names = [f"{kind}{n}" for kind in "VT" for n in range(len(VOCABULARIES))]
    places = {name: family.base.parent / name.lower() for name in names}
    places |= {"BASE": family.base} | {f"E{n}": path for n, path in enumerate(family.experts)}
    text = json.dumps(recipe)
    for name, path in places.items():
        text = text.replace(f'"{name}"', json.dumps(str(path)))
    found: dict[str, Any] = json.loads(text)
    return found


if __name__ == "__main__":
    sys.exit(main())
