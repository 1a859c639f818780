"""Adapters made by peft itself, against its own ``merge_and_unload``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.merges import load_merged

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

Build = Callable[[], Any]


def _llama(**config: Any) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=64, tie_word_embeddings=False, **config,
        )
    )  # fmt: skip


def _gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    )


def _bert() -> Any:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=64, max_position_embeddings=32,
        )
    )  # fmt: skip


def _vit() -> Any:
    return transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            image_size=16, patch_size=4,
        )
    )  # fmt: skip


CASES: dict[str, tuple[Build, dict[str, Any]]] = {
    "plain": (_llama, {"target_modules": ["q_proj", "v_proj"]}),
    "all layers, rank-stabilised": (
        _llama,
        {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 3},
    ),
    "ranks and alphas by module": (
        _llama,
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {r"layers\.1\..*q_proj": 2, "v_proj": 6},
            "alpha_pattern": {"model.layers.0.mlp.down_proj": 5, "v_proj": 1},
        },
    ),
    "embeddings and head": (
        _llama,
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    ),
    "modules to save": (
        _llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    ),
    "biases": (
        _bert,
        {"target_modules": ["query", "value"], "bias": "all", "task_type": "SEQ_CLS"},
    ),
    "transposed layers": (_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "convolution": (_vit, {"target_modules": ["projection", "query"]}),
}


def _randomise(model: Any) -> None:
    """Training, as far as an adapter can tell."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """Folders of a base and of an adapter, and the weights that peft makes of the two."""
    build, options = CASES[request.param]
    folder = tmp_path_factory.mktemp("peft")
    torch.random.manual_seed(0)
    model = build()
    with torch.no_grad():  # biases start as zeros, and zeros hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, **options))
    _randomise(adapted)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    return folder / "base", folder / "adapter", load_merged(folder / "merged")


def _merge(recipe: dict[str, Any], output: Path) -> dict[str, torch.Tensor]:
    storage = open_storage()
    run_plan(make_plan(parse_recipe(recipe), storage, MergeOptions(), str(output)), storage)
    return load_merged(output)


@pytest.mark.filterwarnings("ignore")  # of peft and transformers, about their own
@pytest.mark.parametrize("method", ["task_arithmetic", "swudi_a"])
def test_one_adapter_is_what_peft_merges(
    method: str, case: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    base, adapter, expected = case
    recipe = {"merge_method": method, "base_model": str(base), "models": [{"model": str(adapter)}]}
    found = _merge(recipe, tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
