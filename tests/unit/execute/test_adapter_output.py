"""Adapters merged into an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.errors import PlanError, RecipeError
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.publish import find_published
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from merging.unpublish import unpublish
from tests.support.adapters import AdapterFamily, make_adapters, write_adapter
from tests.support.checkpoints import write_checkpoint
from tests.support.merges import load_merged

METHODS = {"swudi_a": {}, "tsv_m": {}, "iso_c": {"scale": 1.0}, "swudi": {}, "knots_ties": {}}


@pytest.fixture
def family(tmp_path: Path) -> AdapterFamily:
    return make_adapters(tmp_path / "models", dtype=torch.float32, whole=False)


def merge(recipe: dict[str, Any], output: Path, **options: Any) -> Plan:
    storage = open_storage()
    plan = make_plan(parse_recipe(recipe), storage, MergeOptions(**options), str(output))
    run_plan(plan, storage)
    return plan


def update_of(folder: Path) -> dict[str, torch.Tensor]:
    """B A with the scaling that the config gives, by module."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank = config["rank_pattern"].get(module, config["r"])
            alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
            assert down.shape[0] == rank
            up = tensors[name.replace("lora_A", "lora_B")]
            found[f"{module}.weight"] = (up.double() @ down.double()) * alpha / rank
    return found


@pytest.mark.parametrize("method", METHODS)
def test_base_and_adapter_are_the_merged_checkpoint(
    tmp_path: Path, family: AdapterFamily, method: str
) -> None:
    recipe = family.recipe(method, family.adapters, **METHODS[method])
    merge(recipe, tmp_path / "whole")
    plan = merge(recipe, tmp_path / "adapter", adapter_rank=0)
    whole, update = load_merged(tmp_path / "whole"), update_of(tmp_path / "adapter")
    for name, tensor in whole.items():
        base = family.base_state[name].double()
        change = tensor.double() - base
        if name in update:
            assert (change - update[name]).norm() < 1e-4 * change.norm()
        else:
            assert torch.equal(tensor, family.base_state[name])
    base_uris = {str(family.base)}
    read = {
        plan.files[s.file].uri for shard in plan.shards for p in shard.problems for s in p.sources
    }
    assert not any(uri.startswith(tuple(base_uris)) for uri in read)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_loads_it_and_computes_as_the_merged_model(
    tmp_path: Path, family: AdapterFamily
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe = family.recipe("tsv_m", family.adapters)
    merge(recipe, tmp_path / "whole")
    merge(recipe, tmp_path / "adapter", adapter_rank=0)
    base = AutoModelForCausalLM.from_pretrained(family.base)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    tokens = torch.arange(1, 9).unsqueeze(0)
    torch.testing.assert_close(adapted(tokens).logits, whole(tokens).logits, rtol=1e-4, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(family.base)(tokens).logits
    assert not torch.allclose(plain, whole(tokens).logits, atol=1e-4)


def test_adapter_of_a_smaller_rank_is_the_best_of_that_rank(
    tmp_path: Path, family: AdapterFamily
) -> None:
    recipe = family.recipe("tsv_m", family.adapters)
    merge(recipe, tmp_path / "full", adapter_rank=0)
    merge(recipe, tmp_path / "small", adapter_rank=3)
    config = json.loads((tmp_path / "small/adapter_config.json").read_text())
    assert config["r"] == 3
    assert not config["rank_pattern"]
    full, small = update_of(tmp_path / "full"), update_of(tmp_path / "small")
    report = json.loads((tmp_path / "small/merge_report.json").read_text())
    errors = {t["name"]: t.get("adapter_error") for t in report["tensors"]}
    for name, update in full.items():
        values = torch.linalg.svdvals(update)
        best = float(values[3:].norm() / values.norm())
        error = float((update - small[name]).norm() / update.norm())
        assert error == pytest.approx(best, rel=1e-3)
        told = errors[f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"]
        assert told == pytest.approx(best, rel=1e-3)


def test_updates_of_higher_rank_are_approximated_with_a_warning(
    tmp_path: Path, family: AdapterFamily
) -> None:
    recipe = family.recipe("optmerge", family.adapters)
    merge(recipe, tmp_path / "out", adapter_rank=0)
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    errors = [t["adapter_error"] for t in report["tensors"] if "adapter_error" in t]
    assert max(errors) > 0.01
    assert any("lacks" in warning for warning in report["warnings"])


@pytest.mark.parametrize(("method", "parameters"), [("iso_c", {}), ("tsv_m", {"svc": 0.5})])
def test_passes_over_the_model_are_refused(
    tmp_path: Path, family: AdapterFamily, method: str, parameters: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match="with these parameters"):
        merge(
            family.recipe(method, family.adapters, **parameters), tmp_path / "out", adapter_rank=0
        )


def test_ranks_that_differ_from_layer_to_layer_are_patterns(
    tmp_path: Path, family: AdapterFamily
) -> None:
    merge(family.recipe("tsv_m", family.adapters), tmp_path / "out", adapter_rank=0)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == 10  # 4 + 2 + 4
    assert set(config["rank_pattern"].values()) == {6}  # the first leaves the last layer alone
    assert config["alpha_pattern"] == config["rank_pattern"]


def test_result_is_an_adapter_that_merges_again(tmp_path: Path, family: AdapterFamily) -> None:
    merge(family.recipe("tsv_m", family.adapters), tmp_path / "one", adapter_rank=0)
    merge(
        family.recipe("tsv_m", [tmp_path / "one", family.adapters[0]]),
        tmp_path / "two",
        adapter_rank=8,
    )
    assert json.loads((tmp_path / "two/adapter_config.json").read_text())["r"] == 8


def test_layers_stored_the_other_way_around_are_written_as_peft_wants_them(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    name = "transformer.h.0.mlp.c_fc"
    generator = torch.Generator().manual_seed(0)
    state = {f"{name}.weight": torch.randn(16, 24, generator=generator)}
    write_checkpoint(tmp_path / "base", state, config=config)
    for number in range(2):
        down = torch.randn(2, 16, generator=generator)
        up = torch.randn(24, 2, generator=generator)
        tensors = {
            f"base_model.model.{name}.lora_A.weight": down,
            f"base_model.model.{name}.lora_B.weight": up,
        }
        write_adapter(
            tmp_path / f"a{number}", tensors, r=2, fan_in_fan_out=True, target_modules=["c_fc"]
        )
    recipe = {
        "merge_method": "tsv_m",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / f"a{n}")} for n in range(2)],
    }
    merge(recipe, tmp_path / "whole")
    merge(recipe, tmp_path / "out", adapter_rank=0)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["fan_in_fan_out"]
    change = load_merged(tmp_path / "whole")[f"{name}.weight"] - state[f"{name}.weight"]
    found = update_of(tmp_path / "out")[f"{name}.weight"].t()
    torch.testing.assert_close(found.float(), change, rtol=1e-3, atol=1e-4)


def test_adapter_is_published_last_found_again_and_removed_whole(
    tmp_path: Path, family: AdapterFamily
) -> None:
    recipe, out = family.recipe("tsv_m", family.adapters), tmp_path / "out"
    plan = merge(recipe, out, adapter_rank=0)
    names = {path.name for path in out.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert not names & {"model.safetensors.index.json", "config.json", ".mergeyard"}
    assert "library_name: peft" in (out / "README.md").read_text()
    storage = open_storage()
    report = find_published(plan, storage)
    assert report is not None
    with pytest.raises(PlanError, match="already holds a checkpoint"):
        make_plan(parse_recipe(recipe), storage, MergeOptions(adapter_rank=0), str(out))
    unpublish(plan, report, storage)
    assert not list(out.glob("adapter*"))


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_methods_whose_result_is_no_adapter_are_refused(
    tmp_path: Path, family: AdapterFamily, method: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        merge(family.recipe(method, family.adapters), tmp_path / "out", adapter_rank=0)
    assert "/merge_method" in {fault.pointer for fault in caught.value.faults}


def test_whole_models_and_saved_modules_are_refused_by_expert(
    tmp_path: Path, family: AdapterFamily
) -> None:
    models = [family.adapters[0], family.base.parent / "whole"]
    write_checkpoint(
        models[1], family.base_state, config=json.loads((family.base / "config.json").read_text())
    )
    with pytest.raises(RecipeError) as caught:
        merge(family.recipe("tsv_m", models), tmp_path / "out", adapter_rank=0)
    assert [fault.pointer for fault in caught.value.faults] == ["/models/1/model"]
    file = family.adapters[1] / "adapter_model.safetensors"
    norm = {"base_model.model.model.norm.weight": torch.ones(64)}
    save_file(load_file(file) | norm, file)
    with pytest.raises(RecipeError, match=r"model\.norm\.weight") as caught:
        merge(family.recipe("tsv_m", family.adapters), tmp_path / "out", adapter_rank=0)
    assert [fault.pointer for fault in caught.value.faults] == ["/models/1/model"]


def test_vocabularies_and_documents_are_no_part_of_an_adapter(
    tmp_path: Path, family: AdapterFamily
) -> None:
    recipe = family.recipe("tsv_m", family.adapters)
    with pytest.raises(RecipeError) as caught:
        merge(
            {"documents": [{**recipe, "name": "x"}, {**recipe, "base_model": "x"}]},
            tmp_path / "out",
            adapter_rank=0,
        )
    assert caught.value.faults[0].pointer == "/documents"
