"""How close a step of WUDI comes to the machine's rate of multiplying, and how the others compare.

For each shape (rows x columns of a layer) three things take turns: the bare product that a step
rests on, steps of our solver, and steps of the published loop with automatic differentiation. A
second table times whole merges of one tensor by each method.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.records import conditions, interleaved, write_record
from merging.method import Task, get_method
from merging.ops.adam import adam_on_problem
from merging.ops.forms import LayerShape, adam_flops, cheapest
from merging.ops.gram_form import GramProblem
from merging.ops.precision import Precision, float32_products
from merging.ops.problem import LayerProblem
from merging.ops.row_form import RowProblem

SHAPES = ["768x768", "3072x768", "768x3072", "1024x1024", "2048x2048", "4096x1024"]
DIRECT = ["wudi_cfs", "swudi_a", "swudi_soft"]
RMS = 3e-4


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and record."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    precisions: list[Precision] = ["highest"]
    if device.type == "cuda":
        precisions = ["highest", "high", "medium"]
    figures = [
        _measure(shape, options, device, precision)
        for shape in options.shapes
        for precision in precisions
    ]
    merges = [
        _measure_merges(figure, options, device)
        for figure in figures
        if figure["precision"] == "highest"
    ]
    where = conditions(device)
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(f"{where['processor']}, {where['device']}, {where['threads']} threads")
    console.print(_step_table(figures))
    console.print(_merge_table(merges))
    if options.json:
        write_record(options.json, device, {"steps": figures, "merges": merges})


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solver", description=__doc__)
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows x columns, as 768x3072")
    parser.add_argument("--experts", type=int, default=8, help="task vectors (8)")
    parser.add_argument("--steps", type=int, default=5, help="steps timed together (5)")
    parser.add_argument("--rounds", type=int, default=3, help="turns, the best counts (3)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    parser.add_argument("--no-autograd", action="store_true", help="leave the published loop out")
    parser.add_argument("--json", type=Path, help="write figures and conditions to this file")
    options = parser.parse_args(arguments)
    for shape in options.shapes:
        if len(shape.split("x")) != 2 or not all(side.isdecimal() for side in shape.split("x")):
            parser.error(f"{shape!r} is not rows x columns, as 768x3072")
    return options


def _task_vectors(shape: str, num_experts: int, device: torch.device) -> torch.Tensor:
    rows, columns = map(int, shape.split("x"))
    generator = torch.Generator(device).manual_seed(0)
    size = (num_experts, rows, columns)
    return torch.randn(size, generator=generator, device=device).mul_(RMS)


def _measure(
    shape: str, options: argparse.Namespace, device: torch.device, precision: Precision
) -> dict[str, Any]:
    """Rates of one shape."""
    T = _task_vectors(shape, options.experts, device)
    layer = LayerShape(T.shape[1], T.shape[2], len(T))
    form = cheapest(adam_flops(layer, 300))
    problem: LayerProblem = GramProblem(T[0]) if form == "gram" else RowProblem(T[0], len(T))
    for one in T:
        problem.accumulate(one.clone())
    problem.finish()
    M = problem.total.clone()
    if isinstance(problem, RowProblem):
        right, flops = problem.S.t().contiguous(), 4.0 * M.numel() * len(problem.S)
    else:
        right, flops = problem.A, 2.0 * M.numel() * M.shape[1]
    out = M.new_empty((M.shape[0], right.shape[1]))

    def multiply() -> None:
        with float32_products(device, precision):
            for _ in range(options.steps):
                torch.mm(M, right, out=out)

    def solve() -> None:
        steps, rate = options.steps, 0.037 * RMS
        adam_on_problem(
            M, problem, steps=steps, learning_rate=rate, epsilon=1e-9, precision=precision
        )

    runs: dict[str, Callable[[], object]] = {"product": multiply, "step": solve}
    if not options.no_autograd and precision == "highest":
        runs["autograd"] = _autograd_step(T)
    times = interleaved(runs, device, options.rounds)
    product_flops = 2.0 * M.numel() * right.shape[1]
    rate = product_flops * options.steps / times["product"]
    step = times["step"] / options.steps
    return {
        "shape": shape,
        "experts": len(T),
        "form": form,
        "precision": precision,
        "product_flops_per_second": rate,
        "step_flops": flops,
        "step_seconds": step,
        "share_of_product_rate": flops / step / rate,
        "autograd_step_seconds": times.get("autograd"),
        "autograd_ratio": times["autograd"] / step if "autograd" in times else None,
    }


def _autograd_step(T: torch.Tensor) -> Callable[[], object]:
    """One step of algorithm 1 as it is published."""
    weights = 1 / T.square().sum(dim=(1, 2))
    M = torch.nn.Parameter(T.sum(dim=0))
    adam = torch.optim.Adam([M], lr=1e-5)

    def step() -> None:
        adam.zero_grad()
        interference = (M - T) @ T.transpose(1, 2)
        loss = (weights * interference.square().sum(dim=(1, 2))).sum()
        loss.backward()
        adam.step()

    return step


def _measure_merges(
    figure: dict[str, Any], options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Seconds of whole merges of one tensor; WUDI's from its parts."""
    T = _task_vectors(figure["shape"], options.experts, device)
    base = torch.zeros_like(T[0])

    def run(name: str, **parameters: Any) -> Callable[[], object]:
        method = get_method(name)
        task = Task("w", method.parameters(**parameters), [None] * len(T))
        return lambda: method.merge(base, iter(T), task)

    runs = {"wudi": run("wudi", steps=0)} | {name: run(name) for name in DIRECT}
    found = interleaved(runs, device, 1)
    found["wudi"] += 300 * figure["step_seconds"]
    return {"shape": figure["shape"], "experts": len(T), "seconds": found}


def _step_table(figures: list[dict[str, Any]]) -> Table:
    table = Table(title="A step of WUDI")
    for name in ("shape", "experts", "form", "precision"):
        table.add_column(name, no_wrap=True)
    for name in (
        "product\nGFLOP/s",
        "step\nGFLOP",
        "step\nms",
        "share\nof rate",
        "times\nautograd",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for figure in figures:
        ratio = figure["autograd_ratio"]
        table.add_row(
            figure["shape"],
            str(figure["experts"]),
            figure["form"],
            figure["precision"],
            f"{figure['product_flops_per_second'] / 1e9:.1f}",
            f"{figure['step_flops'] / 1e9:.2f}",
            f"{1e3 * figure['step_seconds']:.2f}",
            f"{100 * figure['share_of_product_rate']:.1f} %",
            "" if ratio is None else f"{ratio:.1f}",
        )
    return table


def _merge_table(merges: list[dict[str, Any]]) -> Table:
    table = Table(title="Seconds to merge one tensor (wudi: 300 steps, extrapolated)")
    table.add_column("shape")
    table.add_column("experts")
    for name in ("wudi", *DIRECT):
        table.add_column(name, justify="right")
    for merge in merges:
        times = (f"{seconds:.2f}" for seconds in merge["seconds"].values())
        table.add_row(merge["shape"], str(merge["experts"]), *times)
    return table


if __name__ == "__main__":
    main()
