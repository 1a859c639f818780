"""Real architectures of transformers, tiny: merged checkpoints load without a word and run.

Layers are merged as layers, routers, embeddings and norms are not, and tensors keep the layout that
they came in, mixtures of experts too.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.roles import describe_tensor
from merging.storage.router import open_storage

pytestmark = pytest.mark.slow

ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA_LIKE = {**ENCODER, "num_key_value_heads": 2, "vocab_size": 200}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
VISION = {**ENCODER, "image_size": 32, "patch_size": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

IDS = {"input_ids": torch.arange(3, 13)[None]}
PIXELS = {"pixel_values": torch.zeros(1, 3, 32, 32)}


@dataclass(frozen=True)
class Model:
    """An architecture.

    Attributes:
        name: Of its class.
        config: Makes its config.
        num_linear: Weights of linear layers.
        kinds: How many tensors there are of some kinds.
        inputs: Of a forward pass.
    """

    name: str
    config: Callable[[], Any]
    num_linear: int
    kinds: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=lambda: IDS)


MODELS = {
    "gpt2": Model(
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=200, n_positions=64, **SPECIAL
        ),
        8,
        {"attention.qkv": 2, "position": 1},
    ),
    "qwen3-tied": Model(
        "Qwen3ForCausalLM",
        lambda: transformers.Qwen3Config(**LLAMA_LIKE, head_dim=16, tie_word_embeddings=True),
        14,
    ),
    "gemma": Model(
        "GemmaForCausalLM", lambda: transformers.GemmaConfig(**LLAMA_LIKE, head_dim=16), 14
    ),
    "gemma3": Model(
        "Gemma3ForCausalLM",
        lambda: transformers.Gemma3TextConfig(**LLAMA_LIKE, head_dim=16, sliding_window=16),
        14,
        {"norm": 13},
    ),
    "phi": Model(
        "PhiForCausalLM", lambda: transformers.PhiConfig(**LLAMA_LIKE), 12, {"mlp.fc_in": 2}
    ),
    "phi3": Model(
        "Phi3ForCausalLM",
        lambda: transformers.Phi3Config(**LLAMA_LIKE, pad_token_id=0),
        8,
        {"attention.qkv": 2, "mlp.gate_up": 2},
    ),
    "mixtral": Model(
        "MixtralForCausalLM",
        lambda: transformers.MixtralConfig(**LLAMA_LIKE, num_local_experts=4),
        32,
        {"router": 2},
    ),
    "qwen3-moe": Model(
        "Qwen3MoeForCausalLM",
        lambda: transformers.Qwen3MoeConfig(**LLAMA_LIKE, **EXPERTS, head_dim=16),
        32,
        {"router": 2, "mlp.experts.gate": 8, "mlp.experts.up": 8, "mlp.experts.down": 8},
    ),
    "qwen3-next": Model(
        "Qwen3NextForCausalLM",
        lambda: transformers.Qwen3NextConfig(
            **LLAMA_LIKE | {"num_hidden_layers": 4},
            **EXPERTS,
            head_dim=16,
            shared_expert_intermediate_size=32,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        ),
        73,
        {"router": 8, "mlp.shared_experts.up": 4, "attention.qkv": 3, "conv": 3, "attention.q": 1},
    ),
    "deepseek-v3": Model(
        "DeepseekV3ForCausalLM",
        lambda: transformers.DeepseekV3Config(
            **LLAMA_LIKE | {"num_key_value_heads": 4},
            moe_intermediate_size=32,
            n_routed_experts=8,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            q_lora_rank=24,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
        ),
        40,
        {"router": 1, "attention.kv_a": 2, "attention.kv_b": 2, "mlp.experts.up": 8},
    ),
    "gpt-oss": Model(
        "GptOssForCausalLM",
        lambda: transformers.GptOssConfig(
            **LLAMA_LIKE,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=16,
        ),
        8,
        {"router": 2, "mlp.experts.gate_up": 2, "mlp.experts.down": 2},
    ),
    "bert": Model("BertModel", lambda: transformers.BertConfig(**ENCODER, vocab_size=200), 13),
    "roberta": Model(
        "RobertaForMaskedLM",
        lambda: transformers.RobertaConfig(**ENCODER, vocab_size=200, max_position_embeddings=40),
        12,
        {"head": 1, "position": 1},
    ),
    "vit": Model(
        "ViTForImageClassification",
        lambda: transformers.ViTConfig(**VISION),
        12,
        {"conv": 1, "head": 1, "position": 1},
        PIXELS,
    ),
    "clip": Model(
        "CLIPModel",
        lambda: transformers.CLIPConfig(
            text_config={
                **ENCODER,
                **SPECIAL,
                "vocab_size": 200,
                "max_position_embeddings": 32,
                "pad_token_id": 0,
            },
            vision_config=VISION,
            projection_dim=32,
        ),
        26,
        {"projection": 2, "attention.q": 4, "mlp.fc_in": 4},
        IDS | PIXELS,
    ),
    "llava": Model(
        "LlavaForConditionalGeneration",
        lambda: transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**LLAMA_LIKE),
            vision_config=transformers.CLIPVisionConfig(**VISION),
            image_token_index=199,
        ),
        28,
        {"attention.q": 4, "mlp.gate": 2, "mlp.fc_in": 2, "head": 1},
    ),
    "qwen2-vl": Model(
        "Qwen2VLForConditionalGeneration",
        lambda: transformers.Qwen2VLConfig(
            text_config={
                **LLAMA_LIKE,
                **SPECIAL,
                "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]},
            },
            vision_config={
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 64,
                "num_heads": 4,
                "patch_size": 4,
                "mlp_ratio": 2,
            },
            image_token_id=190,
            video_token_id=191,
            vision_start_token_id=192,
            vision_end_token_id=193,
        ),
        24,
        {"attention.qkv": 2, "attention.q": 2, "conv": 1, "head": 1},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_merges_of_the_architecture_load_and_run(name: str, tmp_path: Path) -> None:
    about = MODELS[name]
    model_class = getattr(transformers, about.name)
    torch.manual_seed(0)  # noqa: TID251 - transformers draws first weights from the global state
    model = model_class(about.config())
    models = _write_family(model, tmp_path)
    stored = load_file(tmp_path / "base" / "model.safetensors")
    config = model.config.to_dict()
    roles = [describe_tensor(key, tensor.shape, config) for key, tensor in stored.items()]
    assert sum(role.is_linear for role in roles) == about.num_linear
    assert Counter(role.kind for role in roles) | Counter(about.kinds) == Counter(
        role.kind for role in roles
    )
    for method, parameters in (("linear", {}), ("wudi", {"steps": 5})):
        recipe = {"merge_method": method, "parameters": parameters, "models": models[1:]}
        if method == "wudi":
            recipe["base_model"] = models[0]["model"]
        output = tmp_path / method
        report = _merge(recipe, output)
        solved = sum(tensor["method"] == method for tensor in report["tensors"])
        assert solved == (about.num_linear if method == "wudi" else len(stored))
        merged = load_file(output / "model-00001-of-00001.safetensors")
        assert {k: t.shape for k, t in merged.items()} == {k: t.shape for k, t in stored.items()}
        assert any(not torch.equal(merged[key], stored[key]) for key in stored)
        loaded, info = model_class.from_pretrained(output, output_loading_info=True)
        assert not any(
            info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        )
        with torch.no_grad():
            assert torch.isfinite(loaded.eval()(**about.inputs)[0]).all()


def _write_family(model: Any, folder: Path) -> list[dict[str, str]]:
    """A base and two experts with random task vectors, as models of a recipe, base first."""
    model.save_pretrained(folder / "base")
    base = {key: value.clone() for key, value in model.state_dict().items()}
    for expert in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 1e-3)
        model.save_pretrained(folder / f"expert-{expert}")
        model.load_state_dict(base)
    return [{"model": str(folder / name)} for name in ("base", "expert-0", "expert-1")]


def _merge(recipe: dict[str, Any], output: Path) -> dict[str, Any]:
    storage = open_storage()
    return run_plan(make_plan(parse_recipe(recipe), storage, MergeOptions(), str(output)), storage)
