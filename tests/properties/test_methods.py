"""What every registered method promises; a new method is asked without being named here."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from merging.errors import NumericalError
from merging.method import all_methods
from merging.parameters import Parameters
from tests.support.tensors import make_models, merge

METHODS = sorted(all_methods())
ELEMENTWISE = [name for name in METHODS if all_methods()[name].separable == "elementwise"]
BY_MATRICES = [name for name in METHODS if all_methods()[name].default_touch == "linear"]
BY_ROWS = [name for name in METHODS if all_methods()[name].separable == "rows"]
SYMMETRIC = [name for name in METHODS if all_methods()[name].symmetric]

TURNS = "goes part of the way"
DROPS = "drops entries that are small in themselves"
NOT_THE_EXPERT = {
    "cat": "adds a share of the updates",
    "slerp": TURNS,
    "nearswap": TURNS,
    "arcee_fusion": TURNS,
    "ram": DROPS,
    "ramplus_tl": DROPS,
    "pcb": DROPS,
    "doge": "gives every expert the same norm",
    "robust_merge": DROPS,
}
"""Methods with which one expert, by default, is not the result."""

NOT_IN_PROPORTION = {
    "nearswap": TURNS,
    "arcee_fusion": "ranks rows by their softmaxes",
    "ram": DROPS,
    "ramplus_tl": DROPS,
    "doge": "gives every expert the same norm",
}
"""Methods whose update does not grow in proportion to the task vectors."""

BUSY: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.4},
    "dare_linear": {"density": 0.4},
    "dare_ties": {"density": 0.4},
    "breadcrumbs": {"density": 0.4},
    "breadcrumbs_ties": {"density": 0.4},
    "della": {"density": 0.4},
    "della_linear": {"density": 0.4},
    "knots_ties": {"density": 0.4},
    "consensus_ties": {"density": 0.4},
}
"""Expert parameters that make a method do more than it does by default."""

TAKES_ONE = [
    name for name in METHODS if all_methods()[name].min_experts == 1 and name not in NOT_THE_EXPERT
]

SHAPE = (24, 40)


def _make(
    method_name: str, num_experts: int, shape: Sequence[int] = SHAPE, **options: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and so many experts, or as many as the method takes."""
    method = all_methods()[method_name]
    count = min(max(num_experts, method.min_experts), method.max_experts or num_experts)
    return make_models(shape, count, **options)


def _weights(method_name: str, num_experts: int) -> list[dict[str, Any]]:
    """Different weights where experts have one, and what makes the method busy."""
    fields = all_methods()[method_name].expert_parameters.model_fields
    parameters = [dict(BUSY.get(method_name, {})) for _ in range(num_experts)]
    if "weight" in fields:
        for number, one in enumerate(parameters):
            one["weight"] = 0.5 + 0.25 * number
    return parameters


def _merge(method_name: str, base: torch.Tensor, experts: list[torch.Tensor], **task: Any):
    return merge(method_name, base, experts, {}, _weights(method_name, len(experts)), **task)


def _close(actual: torch.Tensor, expected: torch.Tensor, base: torch.Tensor, share: float) -> bool:
    """Whether results differ by at most a share of what was added to the base."""
    added = (expected - base).double().norm()
    return bool((actual - expected).double().norm() <= share * added)


@pytest.mark.parametrize("method_name", METHODS)
def test_experts_equal_to_the_base_give_the_base(method_name: str) -> None:
    base, experts = _make(method_name, 3)
    merged = merge(method_name, base, [base] * len(experts))
    torch.testing.assert_close(merged, base, rtol=3e-7, atol=0)


@pytest.mark.parametrize("method_name", TAKES_ONE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_expert_with_default_parameters_is_that_expert(
    method_name: str, dtype: torch.dtype
) -> None:
    base, experts = make_models(SHAPE, 1, dtype=dtype)
    merged = merge(method_name, base, experts)
    torch.testing.assert_close(merged, experts[0].float(), rtol=1e-6, atol=1e-9)
    if dtype == torch.bfloat16:
        assert torch.equal(merged.to(dtype), experts[0])


@pytest.mark.parametrize("method_name", SYMMETRIC)
def test_the_order_of_experts_does_not_matter(method_name: str) -> None:
    base, experts = _make(method_name, 3)
    parameters = _weights(method_name, len(experts))
    first = merge(method_name, base, experts, {}, parameters)
    second = merge(method_name, base, experts[::-1], {}, parameters[::-1])
    assert _close(second, first, base, 1e-4)


@pytest.mark.parametrize("method_name", [n for n in METHODS if n not in NOT_IN_PROPORTION])
def test_task_vectors_twice_as_large_give_an_update_twice_as_large(method_name: str) -> None:
    base, experts = _make(method_name, 3, base_rms=0)
    merged = _merge(method_name, base, experts)
    doubled = _merge(method_name, base, [2 * expert for expert in experts])
    torch.testing.assert_close(doubled, 2 * merged, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("method_name", ELEMENTWISE)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(cuts=st.sets(st.integers(1, 959), max_size=4), seed=st.integers(0, 2**63 - 1))
def test_tiles_have_the_bits_of_the_whole(method_name: str, cuts: set[int], seed: int) -> None:
    base, experts = _make(method_name, 3, dtype=torch.bfloat16)
    whole = _merge(method_name, base, experts, seed=seed).view(-1)
    borders = [0, *sorted(cuts), base.numel()]
    for start, end in pairwise(borders):
        flat = [expert.view(-1)[start:end] for expert in experts]
        tile = _merge(method_name, base.view(-1)[start:end], flat, seed=seed, offset=start)
        assert torch.equal(tile, whole[start:end])


@pytest.mark.parametrize("method_name", ELEMENTWISE)
def test_the_size_of_blocks_does_not_show(
    method_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = _make(method_name, 3)
    whole = _merge(method_name, base, experts)
    monkeypatch.setattr("merging.ops.blocks.CPU_BLOCK", 7)
    assert torch.equal(_merge(method_name, base, experts), whole)


@pytest.mark.parametrize("method_name", BY_ROWS)
def test_the_planned_row_block_fixes_the_bits_and_another_stays_close(method_name: str) -> None:
    base, experts = _make(method_name, 3, (200, 40))
    planned = _merge(method_name, base, experts, row_block=64)
    assert torch.equal(_merge(method_name, base, experts, row_block=64), planned)
    assert _close(_merge(method_name, base, experts, row_block=128), planned, base, 1e-4)


@pytest.mark.parametrize("method_name", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_types_are_raised_before_anything_else(method_name: str, dtype: torch.dtype) -> None:
    base, experts = _make(method_name, 3, dtype=dtype)
    merged = _merge(method_name, base, experts)
    assert merged.dtype == torch.float32
    raised = _merge(method_name, base.float(), [expert.float() for expert in experts])
    assert torch.equal(merged, raised)


@pytest.mark.parametrize("method_name", METHODS)
def test_float8_is_read(method_name: str) -> None:
    base, experts = _make(method_name, 2, dtype=torch.float8_e4m3fn, base_rms=1, rms=1)
    merged = _merge(method_name, base, experts)
    raised = _merge(method_name, base.float(), [expert.float() for expert in experts])
    assert torch.equal(merged, raised)


@pytest.mark.parametrize("method_name", METHODS)
def test_inputs_are_left_alone_and_the_result_is_new(method_name: str) -> None:
    base, experts = _make(method_name, 3)
    copies = [tensor.clone() for tensor in (base, *experts)]
    merged = _merge(method_name, base, experts)
    for tensor, copy in zip((base, *experts), copies, strict=True):
        assert torch.equal(tensor, copy)
        assert merged.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("method_name", METHODS)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (0, 4), (4, 0), (1, 1), (3, 1), (2, 3, 4)])
def test_any_shape_works(method_name: str, shape: tuple[int, ...]) -> None:
    base, experts = _make(method_name, 2, shape)
    merged = _merge(method_name, base, experts)
    assert merged.shape == base.shape
    assert torch.isfinite(merged).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method_name", BY_MATRICES)
def test_what_is_not_finite_is_refused_by_name_or_shows(method_name: str, value: float) -> None:
    """Where the check of inputs is switched off."""
    base, experts = _make(method_name, 3)
    experts[-1][2, 3] = value
    told = ""
    try:
        merged = _merge(method_name, base, experts, tensor_name="model.w.weight")
    except NumericalError as error:
        told = error.detail
    assert "'model.w.weight'" in told or not torch.isfinite(merged).all()


@pytest.mark.parametrize("method_name", METHODS)
def test_an_empty_list_of_experts_is_refused_at_planning(method_name: str) -> None:
    assert all_methods()[method_name].min_experts >= 1


@pytest.mark.parametrize("method_name", METHODS)
def test_global_random_state_is_not_touched(method_name: str) -> None:
    base, experts = _make(method_name, 3)
    before = torch.get_rng_state()
    first = _merge(method_name, base, experts)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert torch.equal(_merge(method_name, base, experts), first)


def _digests() -> Iterator[str]:
    for name in METHODS:
        base, experts = _make(name, 3, dtype=torch.bfloat16)
        merged = _merge(name, base, experts, seed=7)
        yield f"{name} {hashlib.sha256(merged.numpy().tobytes()).hexdigest()}"


def test_bits_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    program = """
import torch
torch.set_num_threads(1)
from tests.properties.test_methods import _digests
print(*_digests(), sep="\\n")
"""
    root = Path(__file__).parents[2]
    for hash_seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", program],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.splitlines() == list(_digests())


def _models(method_name: str) -> tuple[type[Parameters], type[Parameters]]:
    method = all_methods()[method_name]
    return method.parameters, method.expert_parameters


def _beyond(option: dict[str, Any]) -> list[float]:
    """Values outside the bounds that a JSON schema states."""
    values = []
    if "minimum" in option:
        values.append(option["minimum"] - 1)
    if "exclusiveMinimum" in option:
        values.append(option["exclusiveMinimum"])
    if "maximum" in option:
        values.append(option["maximum"] * 2 + 1)
    if option.get("type") == "number":
        values += [float("nan"), float("inf")]
    return values


OUT_OF_RANGE = [
    pytest.param(model, field, value, id=f"{name}-{field}-{value}")
    for name in METHODS
    for model in _models(name)
    for field, schema in model.model_json_schema()["properties"].items()
    for option in schema.get("anyOf", [schema])
    for value in _beyond(option)
]


@pytest.mark.parametrize(("model", "field", "value"), OUT_OF_RANGE)
def test_values_out_of_range_are_refused_by_name(
    model: type[Parameters], field: str, value: float
) -> None:
    with pytest.raises(ValidationError) as raised:
        model.model_validate({field: value})
    assert all(error["loc"][0] == field for error in raised.value.errors())


@pytest.mark.parametrize("method_name", METHODS)
def test_unknown_parameters_are_refused_by_name(method_name: str) -> None:
    for model in _models(method_name):
        with pytest.raises(ValidationError) as raised:
            model.model_validate({"densty": 0.5})
        assert raised.value.errors()[0]["loc"] == ("densty",)


@pytest.mark.parametrize("method_name", METHODS)
def test_parameters_survive_being_written_and_read(method_name: str) -> None:
    for model in _models(method_name):
        parameters = model()
        assert model.model_validate(parameters.model_dump(mode="json")) == parameters


@pytest.mark.parametrize("method_name", METHODS)
def test_figures_are_json(method_name: str) -> None:
    import json

    base, experts = _make(method_name, 3)
    figures: dict[str, Any] = {}
    _merge(method_name, base, experts, figures=figures)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


@pytest.mark.parametrize("method_name", METHODS)
def test_numbers_written_as_text_are_understood(method_name: str) -> None:
    """YAML 1.1 reads ``2e-1`` as text, for want of a dot."""
    for model in _models(method_name):
        for field, schema in model.model_json_schema()["properties"].items():
            options = schema.get("anyOf", [schema])
            if numbers := [option for option in options if option.get("type") == "number"]:
                number = "2e-1" if numbers[0].get("minimum", 0) < 1 else "2e0"
                dumped = model.model_validate({field: number}).model_dump()
                np.testing.assert_equal(dumped[field], float(number))
