from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merging.errors import Fault
from merging.selectors import (
    Gradient,
    evaluate,
    filters,
    has_gradient,
    is_constant,
    layer_position,
    parse_value,
    to_plain,
)


def read(raw: Any) -> Any:
    faults: list[Fault] = []
    value = parse_value(raw, "/p", lambda leaf, _pointer: leaf, faults)
    assert faults == []
    return value


def faults_of(raw: Any) -> list[tuple[str, str]]:
    faults: list[Fault] = []
    parse_value(raw, "/p", lambda leaf, _pointer: leaf, faults)
    return [(fault.pointer, fault.detail) for fault in faults]


def test_scalar_is_the_same_for_every_tensor() -> None:
    assert [evaluate(read(0.5), "a", position) for position in (0.0, 0.3, 1.0)] == [0.5] * 3
    assert is_constant(read(0.5))


def test_gradient_runs_linearly_from_the_first_layer_to_the_last() -> None:
    value = read([0, 1, 0.5])
    positions = [layer_position(layer, 5) for layer in range(5)]
    assert [evaluate(value, "w", position) for position in positions] == [0, 0.5, 1, 0.75, 0.5]


def test_tensor_outside_the_layers_takes_the_first_value() -> None:
    assert evaluate(read([0.2, 0.8]), "lm_head.weight", layer_position(-1, 32)) == 0.2


def test_layer_of_a_one_layer_model_takes_the_last_value() -> None:
    assert evaluate(read([0.2, 0.8]), "w", layer_position(0, 1)) == 0.8


def test_gradient_of_one_value_is_constant_over_layers() -> None:
    assert [evaluate(read([0.3]), "w", p) for p in (0.0, 0.5, 1.0)] == [0.3] * 3


def test_first_matching_filter_decides() -> None:
    value = read(
        [
            {"filter": "self_attn.q", "value": 1},
            {"filter": "self_attn", "value": 2},
            {"value": 3},
        ]
    )
    names = ["layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.mlp.up_proj"]
    assert [evaluate(value, name, 0.0) for name in names] == [1, 2, 3]


@pytest.mark.parametrize("any_filter", [{}, {"filter": "*"}, {"filter": None}])
def test_star_and_no_filter_match_every_tensor(any_filter: dict[str, Any]) -> None:
    value = read([{**any_filter, "value": 7}, {"filter": "mlp", "value": 8}])
    assert evaluate(value, "mlp.up_proj", 0.0) == 7
    assert list(filters(value)) == ["mlp"]


def test_no_matching_filter_gives_none() -> None:
    assert evaluate(read({"filter": "mlp", "value": 1}), "self_attn", 0.0) is None


def test_filtered_value_may_be_a_gradient() -> None:
    value = read([{"filter": "mlp", "value": [0, 1]}, {"value": 5}])
    assert evaluate(value, "mlp", 0.25) == 0.25
    assert has_gradient(value)


def test_list_of_texts_is_a_value_of_its_own() -> None:
    value = read(["q_proj", "k_proj"])
    assert evaluate(value, "w", 0.5) == ["q_proj", "k_proj"]
    assert is_constant(value)


def test_booleans_make_no_gradient() -> None:
    assert not isinstance(read([True, False]), Gradient)


@pytest.mark.parametrize(
    ("raw", "pointer", "text"),
    [
        ([{"filter": "mlp", "value": 1}, 0.5], "/p/1", "write it as value: 0.5"),
        ([{"filter": "mlp"}], "/p/0", "needs a 'value'"),
        ({"filter": 3, "value": 1}, "/p/filter", "not 3"),
        ({"filter": "", "value": 1}, "/p/filter", "part of tensor names"),
        ({"filtr": "mlp", "value": 1}, "/p", "Unknown key 'filtr'"),
        ({"value": [{"value": 1}]}, "/p/value", "cannot be nested"),
        ({"value": {"value": 1}}, "/p/value", "cannot be nested"),
    ],
)
def test_malformed_conditions_are_refused(raw: Any, pointer: str, text: str) -> None:
    [(found_pointer, detail)] = faults_of(raw)
    assert found_pointer == pointer
    assert text in detail


def test_leaves_are_read_with_their_pointers() -> None:
    seen: list[tuple[str, Any]] = []

    def keep(leaf: Any, pointer: str) -> Any:
        seen.append((pointer, leaf))
        return leaf

    parse_value([{"filter": "a", "value": [1, 2]}, {"value": 3}], "/p", keep, [])
    parse_value({"value": 4}, "/q", keep, [])
    assert seen == [("/p/0/value/0", 1), ("/p/0/value/1", 2), ("/p/1/value", 3), ("/q/value", 4)]


numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9)
plain_values = numbers | st.lists(numbers, min_size=1) | st.booleans() | st.text()
conditions = st.fixed_dictionaries(
    {"value": plain_values}, optional={"filter": st.text(min_size=1) | st.none()}
)


@given(plain_values | conditions | st.lists(conditions, min_size=1))
def test_plain_form_reads_back_to_the_same_value(raw: Any) -> None:
    value = read(raw)
    assert read(to_plain(value)) == value


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.integers(0, 200), st.integers(1, 200))
def test_interpolation_stays_between_the_neighbouring_values(
    values: list[float], layer: int, num_layers: int
) -> None:
    position = layer_position(min(layer, num_layers - 1), num_layers)
    found = evaluate(Gradient(tuple(values)), "w", position)
    assert min(values) <= found <= max(values)
