from __future__ import annotations

from typing import Any

import pytest

from merging.errors import CheckpointError, MergeError
from merging.options import MergeOptions
from merging.plan.plan import Plan, Problem, Setting
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from tests.support.header_checkpoints import LLAMA_CONFIG, llama_tensors, put_checkpoint
from tests.support.memory_storage import MemoryStorage

A, B, OUTPUT = "mem://models/a", "mem://models/b", "mem://out/merged"
PREFIX = "model.layers."


@pytest.fixture
def storage() -> MemoryStorage:
    memory = MemoryStorage()
    for uri in (A, B):
        config = {
            **LLAMA_CONFIG,
            "num_hidden_layers": 4,
            "layer_types": [uri[-1] + n for n in "0123"],
        }
        put_checkpoint(memory, uri, llama_tensors(layers=4), config=config)
    return memory


def plan(storage: MemoryStorage, *slices: dict[str, Any], **changes: Any) -> Plan:
    recipe = {"merge_method": "passthrough", "slices": list(slices), **changes}
    return make_plan(parse_recipe(recipe), storage, MergeOptions(), OUTPUT)


def of(*sources: tuple[str, int, int], **changes: Any) -> dict[str, Any]:
    entries = [{"model": model, "layer_range": [a, b]} for model, a, b in sources]
    return {"sources": entries, **changes}


def problems(found: Plan) -> dict[str, Problem]:
    return {p.tensor_name: p for shard in found.shards for p in shard.problems}


def read(found: Plan, tensor_name: str) -> list[tuple[str, str]]:
    """Models and names that a tensor is read from."""
    return [
        (found.files[source.file].uri.rsplit("/", 1)[0], source.name or tensor_name)
        for source in problems(found)[tensor_name].experts
    ]


def setting(found: Plan, tensor_name: str) -> Setting:
    return found.settings[problems(found)[tensor_name].setting]


def test_layers_are_numbered_anew_and_named_after_the_layers_that_they_come_from(
    storage: MemoryStorage,
) -> None:
    found = plan(storage, of((A, 0, 3)), of((B, 1, 4)))
    assert {p.layer for p in problems(found).values()} == {-1, 0, 1, 2, 3, 4, 5}
    for layer, source in enumerate([(A, 0), (A, 1), (A, 2), (B, 1), (B, 2), (B, 3)]):
        uri, number = source
        name = "mlp.up_proj.weight"
        assert read(found, f"{PREFIX}{layer}.{name}") == [(uri, f"{PREFIX}{number}.{name}")]


def test_what_stands_before_the_layers_is_of_the_first_slice_and_the_rest_of_the_last(
    storage: MemoryStorage,
) -> None:
    found = plan(storage, of((A, 0, 1)), of((B, 1, 2)))
    assert read(found, "model.embed_tokens.weight") == [(A, "model.embed_tokens.weight")]
    assert read(found, "model.norm.weight") == [(B, "model.norm.weight")]
    assert read(found, "lm_head.weight") == [(B, "lm_head.weight")]


def test_config_has_the_new_number_of_layers_and_their_types(storage: MemoryStorage) -> None:
    found = plan(storage, of((A, 0, 3)), of((B, 1, 4)))
    assert found.config["num_hidden_layers"] == 6
    assert found.config["layer_types"] == ["a0", "a1", "a2", "b1", "b2", "b3"]


def test_only_the_layers_that_are_taken_are_read(storage: MemoryStorage) -> None:
    found = plan(storage, of((A, 1, 2)))
    assert found.totals.bytes_read == sum(2 * p.num_entries for p in problems(found).values())
    assert found.totals.tensors == 3 + 4


def test_parameters_of_source_slice_and_recipe_go_before_each_other_in_this_order(
    storage: MemoryStorage,
) -> None:
    first = of((A, 0, 1), (B, 0, 1), parameters={"weight": 2})
    first["sources"][0]["parameters"] = {"weight": 3}
    second = of((A, 1, 2), (B, 1, 2))
    found = plan(storage, first, second, merge_method="linear", parameters={"weight": 4})
    name = "mlp.up_proj.weight"
    weights = [
        [e["weight"] for e in setting(found, f"{PREFIX}{layer}.{name}").expert_parameters]
        for layer in (0, 1)
    ]
    assert weights == [[3.0, 2.0], [4.0, 4.0]]


def test_gradients_run_over_the_layers_of_their_slice(storage: MemoryStorage) -> None:
    slices = [of((A, 0, 3), (B, 0, 3)), of((A, 3, 4), (B, 3, 4))]
    found = plan(storage, *slices, merge_method="linear", parameters={"weight": [1, 3]})

    def weight(name: str) -> float:
        return float(setting(found, name).expert_parameters[0]["weight"])

    name = "mlp.up_proj.weight"
    assert [weight(f"{PREFIX}{n}.{name}") for n in range(4)] == [1.0, 2.0, 3.0, 3.0]
    assert weight("model.embed_tokens.weight") == weight("lm_head.weight") == 1.0


def test_filters_of_a_source_look_at_its_own_names(storage: MemoryStorage) -> None:
    one = of((B, 2, 4))
    one["sources"][0]["parameters"] = {"scale": [{"filter": "layers.3.", "value": 0.5}]}
    found = plan(storage, one)
    scales = [
        setting(found, f"{PREFIX}{layer}.mlp.up_proj.weight").expert_parameters[0]["scale"]
        for layer in (0, 1)
    ]
    assert scales == [None, 0.5]


def test_base_of_a_slice_has_the_layers_of_its_own_entry(storage: MemoryStorage) -> None:
    found = plan(storage, of((A, 2, 4), (B, 0, 2)), merge_method="slerp", base_model=A)
    name = "mlp.up_proj.weight"
    problem = problems(found)[f"{PREFIX}0.{name}"]
    assert problem.base is not None
    assert problem.base.name == f"{PREFIX}2.{name}"
    assert read(found, f"{PREFIX}0.{name}") == [(B, f"{PREFIX}0.{name}")]


def test_base_that_is_not_among_the_sources_has_their_layers(storage: MemoryStorage) -> None:
    found = plan(storage, of((B, 1, 3)), merge_method="slerp", base_model=A)
    problem = problems(found)[f"{PREFIX}0.mlp.up_proj.weight"]
    assert problem.base is not None
    assert problem.base.name == f"{PREFIX}1.mlp.up_proj.weight"


def test_plan_with_slices_survives_serialisation(storage: MemoryStorage) -> None:
    found = plan(storage, of((A, 0, 3)), of((B, 1, 4)))
    assert Plan.from_json(found.to_json()) == found


def refusal(storage: MemoryStorage, *slices: dict[str, Any], **changes: Any) -> MergeError:
    with pytest.raises(MergeError) as caught:
        plan(storage, *slices, **changes)
    return caught.value


def test_ranges_beyond_the_layers_are_told_together(storage: MemoryStorage) -> None:
    error = refusal(storage, of((A, 0, 5)), of((B, 4, 6)))
    assert [fault.pointer for fault in error.faults] == [
        "/slices/0/sources/0/layer_range",
        "/slices/1/sources/0/layer_range",
    ]
    assert "has 4 layers" in error.detail


def test_unclear_layers_of_the_base_are_refused(storage: MemoryStorage) -> None:
    put_checkpoint(storage, "mem://models/c", llama_tensors(layers=4))
    changes = {"merge_method": "task_arithmetic", "base_model": "mem://models/c"}
    error = refusal(storage, of((A, 0, 2), (B, 1, 3)), **changes)
    assert [(f.pointer, f.code) for f in error.faults] == [
        ("/slices/0/sources", "incompatible_options")
    ]
    assert "list it among the sources" in error.detail


def test_several_stacks_of_layers_are_refused(storage: MemoryStorage) -> None:
    tensors = llama_tensors() | {"vision.layers.0.mlp.up_proj.weight": ("BF16", (4, 4))}
    put_checkpoint(storage, "mem://models/vlm", tensors)
    error = refusal(storage, of(("mem://models/vlm", 0, 1)))
    assert "several stacks of layers (model.layers., vision.layers.)" in error.detail


def test_layers_of_other_shapes_are_refused_by_their_own_names(storage: MemoryStorage) -> None:
    put_checkpoint(storage, "mem://models/wide", llama_tensors(layers=4, hidden=128))
    error = refusal(storage, of((A, 0, 1), ("mem://models/wide", 2, 3)), merge_method="linear")
    assert isinstance(error, CheckpointError)
    assert error.faults[0].pointer == "/slices/0/sources/1/model"
    assert "model.layers.2.mlp.up_proj.weight [256, 128]" in error.detail


def test_one_quantile_over_slices_of_different_experts_is_refused(storage: MemoryStorage) -> None:
    parameters = {"scope": "global", "density": 0.5}
    changes = {"merge_method": "ties", "base_model": A, "parameters": parameters}
    slices = [of((A, 0, 1), (B, 0, 1)), of((A, 1, 2), (B, 1, 2))]
    assert "tensors of each expert together" in refusal(storage, *slices, **changes).detail


def test_base_that_several_slices_name_is_one_input(storage: MemoryStorage) -> None:
    slices = [of((A, n, n + 1), (B, n, n + 1), base_model=A) for n in range(3)]
    found = plan(storage, *slices, merge_method="slerp")
    assert [(item.role, item.uri) for item in found.inputs] == [("base", A), ("expert", B)]
    assert not found.warnings
