"""How well plans foretell their time: estimates beside what merges took on this machine.

    python -m benchmarks estimate [--block] [--json FILE]

Merges a small Llama (hidden 192 and 256) with several methods. ``--block`` adds one block of a 7B
model with WUDI, three experts and two steps (about six minutes), and what the same rates say of the
whole model. Rates are measured first, as a worker does it, and are not corrected in between.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.records import write_record
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
BLOCK = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
"""Linear layers of one block of Llama 7B, out×in."""


def main() -> None:
    """Run the cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block", action="store_true", help="also one block of a 7B model")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rates = measure_rates("cpu", "cpu", 1, folder)
        results = [*_small_models(folder, rates)]
        if arguments.block:
            results.append(_large_block(folder, rates))
    for result in results:
        print(
            f"{result['case']:32} estimate {result['estimate']:8.2f} s"
            f"  truth {result['truth']:8.2f} s  ratio {result['estimate'] / result['truth']:.2f}"
        )
    if arguments.block:
        hours = _whole_model_seconds(rates) / 3600
        print(f"a 7B model with 300 steps on one such core: {hours:.0f} h")
    if arguments.json:
        figures = {"rates": msgspec.to_builtins(rates), "merges": results}
        write_record(arguments.json, torch.device("cpu"), figures)


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


def _large_block(folder: Path, rates: Rates) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    base = {
        f"model.layers.0.{name}.weight": torch.randn(shape, generator=generator)
        .mul_(0.02)
        .bfloat16()
        for name, shape in BLOCK.items()
    }
    paths = []
    for number in range(4):
        state = tune(base, seed=number) if number else base
        paths.append(str(write_checkpoint(folder / f"block-{number}", state)))
    plan = _plan(paths[0], paths[1:], "wudi", folder / "block-out", steps=2)
    return _compare("7B block wudi, 2 steps", plan, rates)


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
    costs = [method.cost(Geometry(shape, 3), method.parameters()) for shape in BLOCK.values()]
    seconds = [
        cost.flops / rates.flops_per_second(*shape)
        for cost, shape in zip(costs, BLOCK.values(), strict=True)
    ]
    return LAYERS * sum(seconds)


if __name__ == "__main__":
    main()
