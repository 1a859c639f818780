"""What every step of a method that looks at samples promises; a new one is asked unnamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from merging.method import Task, all_methods
from merging.sampled import BIAS, FISHER, LINEAR, NORM

STEPS = [(name, step) for name, method in all_methods().items() for step in method.calibrated]
SHAPES = {LINEAR: (12, 20), NORM: (20,), BIAS: (12,), FISHER: (12, 20)}
NUM_ROWS = 50


def make_inputs(step: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and inputs of three experts, as a shard reads them; flat if the step takes them so."""
    generator = torch.Generator().manual_seed(3)
    shape = SHAPES[step]
    base = 0.02 * torch.randn(shape, generator=generator)
    inputs = []
    for _ in range(3):
        inputs.append((base + 0.01 * torch.randn(shape, generator=generator)).reshape(-1))
        X = torch.randn(NUM_ROWS, shape[-1], generator=generator)
        measured = X.T @ X if step == LINEAR else X.square().sum(0)
        if step == FISHER:
            inputs.append(torch.rand(shape, generator=generator).reshape(-1))
        elif step != BIAS:
            inputs.append(torch.cat([measured.reshape(-1), torch.tensor([float(NUM_ROWS)])]))
    return base, inputs


def run(name: str, step: str, base: torch.Tensor, inputs: Iterator[torch.Tensor]) -> torch.Tensor:
    method = all_methods()[name]
    task = Task(
        tensor_name="model.layers.0.mlp.up_proj.weight",
        parameters=method.parameters(),
        expert_parameters=[method.expert_parameters()] * 3,
        shape=SHAPES[step],
        given=[torch.tensor([9.0, 240.0])] * 3,
    )
    return method.step(step).merge(base if method.needs_base else None, inputs, task)


def in_one_buffer(inputs: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """As a worker may hand them over: with the next one, the memory of the last is used again."""
    buffer = torch.empty(max(map(len, inputs)))
    for flat in inputs:
        buffer.fill_(torch.nan)
        buffer[: len(flat)] = flat
        yield buffer[: len(flat)]


@pytest.mark.parametrize(("name", "step"), STEPS)
def test_inputs_stay_as_they_are(name: str, step: str) -> None:
    base, inputs = make_inputs(step)
    before = [tensor.clone() for tensor in (base, *inputs)]
    merged = run(name, step, base, iter(inputs)).view(base.shape)
    assert all(torch.equal(a, b) for a, b in zip(before, (base, *inputs), strict=True))
    assert merged.dtype == torch.float32
    assert torch.isfinite(merged).all()


STREAMING = [(name, step) for name, step in STEPS if all_methods()[name].step(step).streaming]


@pytest.mark.parametrize(("name", "step"), STREAMING)
def test_a_streaming_step_is_done_with_an_input_when_it_asks_for_the_next(
    name: str, step: str
) -> None:
    base, inputs = make_inputs(step)
    expected = run(name, step, base, iter(inputs))
    assert torch.equal(run(name, step, base, in_one_buffer(inputs)), expected)
