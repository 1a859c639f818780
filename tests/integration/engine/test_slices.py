"""Slices of real models of transformers, tiny: what is stacked loads without a word and runs."""

from pathlib import Path

import pytest
import torch
import transformers
import yaml

from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.merges import load_merged

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[3] / "examples/recipes/slices.yaml"


def write_model(folder, config, seed):
    torch.manual_seed(seed)  # noqa: TID251 - transformers draws first weights from the global state
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def merge(recipe, output):
    storage = open_storage()
    plan = make_plan(parse_recipe(recipe), storage, MergeOptions(), str(output))
    return run_plan(plan, storage)


def run_forward(folder):
    """The logits of a merged model, all of whose weights were in its files."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    return model, model(torch.arange(8)[None]).logits


def test_stacked_layers_compute_what_the_layers_of_the_models_do_one_after_the_other(tmp_path):
    config = transformers.Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
    )
    addresses = [write_model(tmp_path / name, config, seed) for seed, name in enumerate("ab")]
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": addresses[0], "layer_range": [0, 3]}]},
            {"sources": [{"model": addresses[1], "layer_range": [1, 4]}]},
        ],
    }
    report = merge(recipe, tmp_path / "merged")
    merged, logits = run_forward(tmp_path / "merged")
    first, second = (transformers.AutoModelForCausalLM.from_pretrained(a) for a in addresses)
    first.model.layers = torch.nn.ModuleList([*first.model.layers[:3], *second.model.layers[1:]])
    for number, layer in enumerate(first.model.layers):
        layer.self_attn.layer_idx = number
    first.config.num_hidden_layers = 6
    first.config.layer_types = ["full_attention"] * 6
    first.model.norm, first.lm_head = second.model.norm, second.lm_head
    torch.testing.assert_close(logits, first(torch.arange(8)[None], use_cache=False).logits)
    assert merged.config.num_hidden_layers == 6
    assert max(tensor["layer"] for tensor in report["tensors"]) == 5


def test_the_example_merges_each_slice_by_its_own_parameters(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        tie_word_embeddings=False,
    )
    folders = {
        address: write_model(tmp_path / address.rsplit("/", 1)[-1], config, seed)
        for seed, address in enumerate(("s3://models/base", "s3://models/chat"))
    }
    recipe = yaml.safe_load(EXAMPLE.read_text())
    recipe["base_model"] = folders[recipe["base_model"]]
    for one in recipe["slices"]:
        for source in one["sources"]:
            source["model"] = folders[source["model"]]
    merge(recipe, tmp_path / "merged")
    run_forward(tmp_path / "merged")
    merged = load_merged(tmp_path / "merged")
    base, chat = (load_merged(Path(folder)) for folder in folders.values())
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(merged[name].float(), base[name], rtol=0.01, atol=1e-4)
    name = "model.layers.{}.self_attn.q_proj.weight"
    last = merged[name.format(47)].float()
    torch.testing.assert_close(last, chat[name.format(31)], rtol=0.01, atol=1e-4)
