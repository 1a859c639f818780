from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from merging.checkpoint.adapter import AdapterIndex, read_model_index
from merging.checkpoint.index import CheckpointIndex
from merging.errors import Fault
from merging.plan.adapters import AdaptedTensor, fit_adapter
from merging.plan.renaming import match_names
from merging.storage.router import open_storage
from tests.support.adapters import write_adapter
from tests.support.checkpoints import write_checkpoint

Shapes = Mapping[str, Sequence[int]]

LLAMA: Shapes = {
    "model.embed_tokens.weight": (64, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (32, 16),
    "model.layers.0.mlp.up_proj.bias": (32,),
    "model.layers.1.self_attn.q_proj.weight": (16, 16),
}
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
FACTORS: Shapes = {f"{QUERY}.lora_A.weight": (4, 16), f"{QUERY}.lora_B.weight": (16, 4)}


def fit(
    folder: Path, tensors: Shapes, base: Shapes = LLAMA, **config: Any
) -> tuple[dict[str, AdaptedTensor], list[Fault]]:
    """What an adapter with tensors of these shapes makes of a base."""
    write_checkpoint(folder / "base", {n: torch.zeros(tuple(s)) for n, s in base.items()})
    made = {n: torch.zeros(tuple(s)) for n, s in tensors.items()}
    write_adapter(folder / "adapter", made, **config)
    storage = open_storage()
    adapter = read_model_index(storage, str(folder / "adapter"))
    model = read_model_index(storage, str(folder / "base"))
    assert isinstance(adapter, AdapterIndex)
    assert isinstance(model, CheckpointIndex)
    return fit_adapter(adapter, model, "/models/0/model")


def refused(folder: Path, tensors: Shapes, **config: Any) -> Fault:
    _, faults = fit(folder, tensors, **config)
    assert len(faults) == 1, faults
    assert faults[0].pointer == "/models/0/model"
    return faults[0]


def test_factors_update_a_tensor_and_others_replace_one(tmp_path: Path) -> None:
    found, faults = fit(
        tmp_path,
        FACTORS
        | {
            "base_model.model.model.embed_tokens.lora_embedding_A": (4, 64),
            "base_model.model.model.embed_tokens.lora_embedding_B": (16, 4),
            "base_model.model.model.embed_tokens.base_layer.weight": (64, 16),
            "base_model.model.model.layers.0.mlp.up_proj.base_layer.bias": (32,),
            "base_model.model.model.layers.0.mlp.up_proj.original_module.bias": (32,),
        },
        lora_alpha=6,
    )
    assert not faults
    assert found.keys() == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.bias",
    }
    query = found["model.layers.0.self_attn.q_proj.weight"]
    assert (query.rank, query.scaling, query.flipped, query.replacement) == (4, 1.5, False, None)
    assert [factor.shape for factor in query.factors] == [(4, 16), (16, 4)]
    embedding = found["model.embed_tokens.weight"]
    assert (embedding.rank, embedding.flipped) == (4, True)
    assert embedding.replacement is not None
    assert found["model.layers.0.mlp.up_proj.bias"].rank == 0


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"lora_alpha": 6, "use_rslora": True}, 3.0),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha_pattern": {r"layers\.0\..*": 2}}, 0.5),
        ({"alpha_pattern": {"proj": 2, "layers.1.self_attn.q_proj": 2}}, 2.0),
        ({"alpha_pattern": {"model.layers.0.self_attn.q_proj": 2, "q_proj": 8}}, 0.5),
        ({"r": 32, "rank_pattern": {"self_attn.q_proj": 4}}, 2.0),
    ],
    ids=str,
)
def test_scaling_is_that_of_the_config(
    config: dict[str, Any], scaling: float, tmp_path: Path
) -> None:
    found, faults = fit(tmp_path, FACTORS, **config)
    assert not faults
    assert found["model.layers.0.self_attn.q_proj.weight"].scaling == scaling


@pytest.mark.parametrize(
    ("tensors", "code", "says"),
    [
        ({f"{QUERY}.lora_A.weight": (4, 16)}, "missing_tensor", "only one of the two factors"),
        (
            FACTORS | {f"{QUERY.removeprefix('base_model.model.')}.lora_A.weight": (4, 16)},
            "index_inconsistent",
            "more than once",
        ),
        (FACTORS | {f"{QUERY}.lora_magnitude_vector": (16,)}, "adapter_unsupported", "DoRA"),
        (FACTORS | {f"{QUERY}.lora_B.bias": (16,)}, "adapter_unsupported", "lora_bias"),
        (FACTORS | {f"{QUERY}.lora_C.weight": (4, 4)}, "adapter_unsupported", "not supported"),
        (
            FACTORS | {"base_model.model.lm_head.weight": (64, 16)},
            "missing_tensor",
            "tied to the embedding cannot be changed by itself",
        ),
        (
            {f"{QUERY}.lora_A.weight": (4, 16, 1), f"{QUERY}.lora_B.weight": (16, 4)},
            "shape_mismatch",
            "lora_A F32 [4, 16, 1]",
        ),
        (
            {f"{QUERY}.lora_A.weight": (), f"{QUERY}.lora_B.weight": (16, 4)},
            "shape_mismatch",
            "lora_A F32 []",
        ),
        (
            {f"{QUERY}.lora_A.weight": (0, 16), f"{QUERY}.lora_B.weight": (16, 0)},
            "shape_mismatch",
            "lora_A F32 [0, 16]",
        ),
        (
            {"base_model.model.model.embed_tokens.weight": (65, 16)},
            "shape_mismatch",
            "[65, 16] instead of [64, 16]",
        ),
        ({}, "missing_tensor", "holds nothing in: adapter_model.safetensors"),
    ],
)
def test_what_is_not_merged_exactly_is_refused(
    tensors: Shapes, code: str, says: str, tmp_path: Path
) -> None:
    fault = refused(tmp_path, tensors)
    assert fault.code == code
    assert says in fault.detail


def test_a_layout_that_the_model_has_not_is_refused(tmp_path: Path) -> None:
    fault = refused(tmp_path, FACTORS, fan_in_fan_out=True)
    assert "stored in×out" in fault.detail


def test_many_misfits_are_one_fault(tmp_path: Path) -> None:
    wrong = {f"{QUERY}.lora_A.weight": (4, 8), f"{QUERY}.lora_B.weight": (16, 4)}
    other = {name.replace("layers.0", "layers.1"): shape for name, shape in wrong.items()}
    fault = refused(tmp_path, wrong | other)
    assert fault.detail.count("lora_A F32 [4, 8]") == 2


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (["model.layers.0.q.weight"], ["layers.0.q.weight"]),
        (["h.0.attn.c.weight"], ["transformer.h.0.attn.c.weight"]),
        (
            ["model.vision.blocks.0.qkv.weight", "model.language.layers.0.q.weight"],
            ["vision.blocks.0.qkv.weight", "language.model.layers.0.q.weight"],
        ),
    ],
    ids=["taken away", "added", "two that differ"],
)
def test_prefixes_that_checkpoints_put_in_front_are_found(
    names: list[str], known: list[str]
) -> None:
    rename = match_names(names, dict.fromkeys(known))
    assert [rename(name) for name in names] == known


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (["a.layers.0.q.weight"], ["b.layers.0.q.weight", "c.layers.0.q.weight"]),
        (["m.layers.0.q.weight", "m.layers.9.q.weight"], ["layers.0.q.weight"]),
        (["m.layers.9.q.weight"], ["m.layers.0.q.weight"]),
        (["m.l.0.q.weight", "m.l.1.q.weight"], ["m.l.0.q.weight", "n.l.1.q.weight"]),
        (["m.q.weight"], ["m.p.weight"]),
    ],
    ids=["two towers", "not all", "another layer", "some are there as they are", "nothing alike"],
)
def test_names_that_could_be_others_are_left_alone(names: list[str], known: list[str]) -> None:
    rename = match_names(names, dict.fromkeys(known))
    assert [rename(name) for name in names] == names
