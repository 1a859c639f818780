"""Real architectures of transformers, tiny: merged checkpoints load without a word and run."""

import pytest
import torch
import transformers

from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage

pytestmark = pytest.mark.slow

LLAMA_LIKE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}

MODELS = {
    "gpt2": (
        "GPT2LMHeadModel",
        transformers.GPT2Config,
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 200, "n_positions": 64, **SPECIAL},
        8,
    ),
    "qwen3-tied": (
        "Qwen3ForCausalLM",
        transformers.Qwen3Config,
        {**LLAMA_LIKE, "head_dim": 16, "tie_word_embeddings": True},
        14,
    ),
    "gemma": ("GemmaForCausalLM", transformers.GemmaConfig, {**LLAMA_LIKE, "head_dim": 16}, 14),
    "mixtral": (
        "MixtralForCausalLM",
        transformers.MixtralConfig,
        {**LLAMA_LIKE, "num_local_experts": 4},
        32,
    ),
    "bert": (
        "BertModel",
        transformers.BertConfig,
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 200,
        },
        13,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_merge_of_the_architecture_loads_and_runs(name, tmp_path):
    class_name, config_class, sizes, num_linear = MODELS[name]
    torch.manual_seed(0)  # noqa: TID251 - transformers draws first weights from the global state
    model = getattr(transformers, class_name)(config_class(**sizes))
    model.save_pretrained(tmp_path / "base")
    base = {key: value.clone() for key, value in model.state_dict().items()}
    for expert in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 1e-3)
        model.save_pretrained(tmp_path / f"expert-{expert}")
        model.load_state_dict(base)
    recipe = {
        "merge_method": "swudi_a",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / f"expert-{expert}")} for expert in range(2)],
    }
    storage = open_storage()
    plan = make_plan(parse_recipe(recipe), storage, MergeOptions(), str(tmp_path / "merged"))
    report = run_plan(plan, storage)
    solved = [tensor["name"] for tensor in report["tensors"] if tensor["method"] == "swudi_a"]
    assert len(solved) == num_linear
    merged, info = getattr(transformers, class_name).from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    output = merged.eval()(input_ids=torch.arange(10)[None])
    assert torch.isfinite(output[0]).all()
    distance = sum((p - base[key]).norm() for key, p in merged.state_dict().items())
    assert 0 < distance < 50
