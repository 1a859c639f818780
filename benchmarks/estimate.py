"""How well plans foretell their time: estimates beside what merges took on this machine.

    python -m benchmarks.estimate [--layer] [--json FILE]

Merges a small Llama (hidden 192 and 256) with several methods. ``--layer`` adds one 4096×4096 layer
of a 7B model with 20 steps of WUDI (about a minute), and what the same rates say of a whole block.
Rates are measured first, as a worker does it, and are not corrected in between.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import torch

from merging.execute.shard import run_shard
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.plan.timing import estimate_seconds
from merging.probe import measure_rates
from merging.rates import Rates
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.checkpoints import make_family, tune, write_checkpoint

METHODS: dict[str, dict[str, float]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "wudi_cfs": {},
    "wudi": {},
}
HIDDEN, INTERMEDIATE, LAYERS = 4096, 11008, 32


def main() -> None:
    """Run the cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layer", action="store_true", help="also one layer of a 7B model")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rates = measure_rates("cpu", "cpu", 1, folder)
        results = [*_small_models(folder, rates)]
        if arguments.layer:
            results.append(_large_layer(folder, rates))
    for result in results:
        print(
            f"{result['case']:32} estimate {result['estimate']:8.2f} s"
            f"  truth {result['truth']:8.2f} s  ratio {result['estimate'] / result['truth']:.2f}"
        )
    if arguments.layer:
        hours = _whole_model_seconds(rates) / 3600
        print(f"a 7B model with 300 steps on one such core: {hours:.0f} h")
    if arguments.json:
        facts = {"machine": platform.processor(), "rates": msgspec.to_builtins(rates)}
        arguments.json.write_text(json.dumps({**facts, "results": results}, indent=2))


def _small_models(folder: Path, rates: Rates) -> list[dict[str, Any]]:
    results = []
    for hidden, layers in ((192, 4), (256, 6)):
        family = make_family(
            folder / f"llama-{hidden}", 3, hidden=hidden, layers=layers, vocab=4096,
            dtype=torch.bfloat16,
        )  # fmt: skip
        models = (str(family.base), [str(expert) for expert in family.experts])
        for method, parameters in METHODS.items():
            output = folder / f"{hidden}-{method}"
            plan = _plan(*models, method, output, **parameters)
            results.append(_compare(f"llama {hidden}×{layers} {method}", plan, rates))
    return results


def _large_layer(folder: Path, rates: Rates) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(HIDDEN, HIDDEN, generator=generator)
    base = {"model.layers.0.self_attn.q_proj.weight": weight.bfloat16()}
    states = [base, *(tune(base, seed=seed) for seed in (1, 2, 3))]
    paths = [str(write_checkpoint(folder / f"layer-{n}", state)) for n, state in enumerate(states)]
    plan = _plan(paths[0], paths[1:], "wudi", folder / "layer-out", steps=20)
    return _compare(f"{HIDDEN}×{HIDDEN} wudi, 20 steps", plan, rates)


def _plan(base: str, experts: list[str], method: str, output: Path, **parameters: object) -> Plan:
    document = {
        "merge_method": method,
        "models": [{"model": expert} for expert in experts],
        "parameters": parameters,
    }
    if method != "linear":
        document["base_model"] = base
    return make_plan(parse_recipe(document), open_storage(), MergeOptions(), str(output))


def _compare(case: str, plan: Plan, rates: Rates) -> dict[str, Any]:
    estimate = estimate_seconds(plan, rates, slots=1)
    assert estimate is not None
    receipts = [run_shard(plan.work(s.index, plan.digest), open_storage()) for s in plan.shards]
    busy = [receipt.busy_seconds for receipt in receipts]
    return {
        "case": case,
        "estimate": estimate.total_seconds,
        "truth": sum(receipt.seconds["total"] for receipt in receipts),
        "estimate_by_stage": msgspec.to_builtins(estimate.seconds),
        "truth_by_stage": {
            "read": sum(seconds["read"] for seconds in busy),
            "solve": sum(receipt.seconds["solve"] for receipt in receipts),
            "write": sum(seconds["write"] for seconds in busy),
        },
    }


def _whole_model_seconds(rates: Rates) -> float:
    """WUDI's 300 steps with three experts for all linear layers of a 7B model."""
    from merging.method import Geometry, get_method

    method = get_method("wudi")
    shapes = [(HIDDEN, HIDDEN)] * 4 + [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]
    costs = [method.cost(Geometry(shape, 3), method.parameters()) for shape in shapes]
    seconds = [
        cost.flops / rates.flops_per_second(*shape)
        for cost, shape in zip(costs, shapes, strict=True)
    ]
    return LAYERS * sum(seconds)


if __name__ == "__main__":
    main()
