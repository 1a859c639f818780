"""How far each precision of WUDI's steps ends from float64, emulated where there is no GPU.

Layers are trained by AdamW from a common start on inputs of a known, uneven covariance, so that
task vectors have the spectra of real ones. The steps' products are rounded as the hardware does:
TF32 keeps 11 bits of operands, bfloat16 8; sums are in float32.

A second table shows why the learning rate follows the size of the task vectors: how the direction
of the update changes when all of them are multiplied by a factor and the rate stays.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.records import write_record
from merging.ops.adam import adam_on_problem
from merging.ops.gram_form import GramProblem
from merging.ops.precision import Precision, SplitProduct
from merging.ops.problem import HalfGradient, LayerProblem
from merging.ops.row_form import RowProblem

SHAPES = ["256x256x8", "192x768x8", "768x192x8", "256x1024x3", "64x1024x4"]
_RMS = 3e-4
_RATE = 0.037 * _RMS
Multiply = Callable[[torch.Tensor, torch.Tensor], None]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows x columns x experts")
    parser.add_argument("--steps", type=int, default=300, help="Adam steps (300)")
    parser.add_argument("--json", type=Path, help="write figures and conditions to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    vectors = {shape: train_experts(*map(int, shape.split("x"))) for shape in options.shapes}
    found = {shape: dict(_measure(Ts, options.steps)) for shape, Ts in vectors.items()}
    scaled = {shape: dict(_measure_scales(Ts, options.steps)) for shape, Ts in vectors.items()}
    table = Table(title=f"Relative difference from float64 after {options.steps} steps (and loss)")
    table.add_column("arithmetic of the steps")
    for shape in options.shapes:
        table.add_column(shape, justify="right", no_wrap=True)
    for name in found[options.shapes[0]]:
        cells = [found[shape][name] for shape in options.shapes]
        table.add_row(name, *(f"{c['update']:.1e} ({c['loss']:.0e})" for c in cells))
    scales = Table(title="Relative change of the update when task vectors are multiplied")
    scales.add_column("factor, rate")
    for shape in options.shapes:
        scales.add_column(shape, justify="right", no_wrap=True)
    for name in scaled[options.shapes[0]]:
        scales.add_row(name, *(f"{scaled[shape][name]:.2g}" for shape in options.shapes))
    console = Console(width=120)
    console.print(table)
    console.print(scales)
    if options.json:
        figures = {"precision": found, "scale": scaled}
        write_record(options.json, torch.device("cpu"), figures)


def train_experts(rows: int, columns: int, num_experts: int) -> list[torch.Tensor]:
    """Task vectors, float32, root mean square 3e-4: students of different teachers."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    start = normal(rows, columns) * 0.02
    scales = torch.arange(1, columns + 1) ** -0.5
    basis = torch.linalg.qr(normal(columns, columns)).Q
    vectors = []
    for _ in range(num_experts):
        teacher = start + 0.01 * normal(rows, 8) @ normal(8, columns)
        W = torch.nn.Parameter(start.clone())
        adamw = torch.optim.AdamW([W], lr=1e-5, weight_decay=0.01)
        mixing = basis * scales @ torch.linalg.qr(normal(columns, columns)).Q
        for _ in range(60):
            X = normal(64, columns) @ mixing.t()
            adamw.zero_grad()
            ((X @ (W - teacher).t()).square().mean()).backward()
            adamw.step()
        T = W.detach() - start
        vectors.append(T * (_RMS / T.square().mean().sqrt()))
    return vectors


def _measure(vectors: list[torch.Tensor], steps: int) -> Iterator[tuple[str, dict[str, float]]]:
    exact = _read(GramProblem, [T.double() for T in vectors])
    reference = _solve(exact, steps)
    least = exact.loss(reference)

    def compare(name: str, problem: LayerProblem) -> tuple[str, dict[str, float]]:
        M = _solve(problem, steps).double()
        difference = float((M - reference).norm() / reference.norm())
        return name, {"update": difference, "loss": abs(exact.loss(M) / least - 1)}

    yield compare("float32, sums (highest)", _read(GramProblem, vectors))
    yield compare("float32, rows (highest)", _read(_rows(len(vectors)), vectors))
    yield compare("split bfloat16 (high)", _read(_emulating(SplitProduct), vectors))
    yield compare("TF32 (medium)", _read(_emulating(_rounded(_to_tf32)), vectors))
    yield compare("bfloat16, not offered", _read(_emulating(_rounded(_to_bfloat16)), vectors))
    stored = [T.bfloat16().float() for T in vectors]
    yield compare("stored in bfloat16", _read(GramProblem, stored))


def _measure_scales(vectors: list[torch.Tensor], steps: int) -> Iterator[tuple[str, float]]:
    reference = _solve(_read(GramProblem, vectors), steps)
    for factor in (0.01, 0.1, 0.3, 3.0, 10.0):
        problem = _read(GramProblem, [factor * T for T in vectors])
        for name, rate in (("fixed", _RATE), ("auto", factor * _RATE)):
            change = _solve(problem, steps, rate) / factor - reference
            yield f"{factor:g}, {name}", float(change.norm() / reference.norm())


def _read(make: Callable[[torch.Tensor], LayerProblem], vectors: list[torch.Tensor]) -> Any:
    problem = make(vectors[0])
    for T in vectors:
        problem.accumulate(T.clone())
    problem.finish()
    return problem


def _solve(problem: LayerProblem, steps: int, rate: float = _RATE) -> torch.Tensor:
    M = problem.total.clone()
    adam_on_problem(M, problem, steps=steps, learning_rate=rate, epsilon=1e-3 * rate)
    return M


def _rows(num_experts: int) -> Callable[[torch.Tensor], LayerProblem]:
    return lambda like: RowProblem(like, num_experts)


def _emulating(product: Callable[[torch.Tensor, int], Multiply]) -> Callable[[torch.Tensor], Any]:
    """Problems in sums whose steps multiply by A in another way."""

    class Emulated(GramProblem):
        def half_gradient(self, rows: slice, precision: Precision) -> HalfGradient:
            del precision
            B_rows = self.B[rows]
            multiply = product(self.A, len(B_rows))

            def half_gradient(M_rows: torch.Tensor, out: torch.Tensor) -> None:
                multiply(M_rows, out)
                out.sub_(B_rows)

            return half_gradient

    return Emulated


def _rounded(
    round_: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor, int], Multiply]:
    def product(A: torch.Tensor, num_rows: int) -> Multiply:
        del num_rows
        rounded_A = round_(A)

        def multiply(X: torch.Tensor, out: torch.Tensor) -> None:
            torch.mm(round_(X), rounded_A, out=out)

        return multiply

    return product


def _to_tf32(X: torch.Tensor) -> torch.Tensor:
    """To 10 bits behind the leading one, halves to even."""
    bits = X.contiguous().view(torch.int32)
    odd = (bits >> 13) & 1
    return ((bits + 0xFFF + odd) & ~0x1FFF).view(torch.float32)


def _to_bfloat16(X: torch.Tensor) -> torch.Tensor:
    return X.bfloat16().float()


if __name__ == "__main__":
    main()
