"""Merges of adapters against merges of the checkpoints that they stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from examples.s3_server import S3Server
from merging.execute.pieces import cut_problems
from merging.execute.shard import run_shard
from merging.local_run import run_plan
from merging.method import all_methods
from merging.options import MergeOptions
from merging.plan.plan import Plan, ShardWork
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.adapters import AdapterFamily, factors, make_adapters, write_adapter
from tests.support.checkpoints import tune, write_checkpoint
from tests.support.documents import REPOSITORY
from tests.support.merges import load_merged, weight_bytes
from tests.support.s3_models import upload_folder


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> AdapterFamily:
    return make_adapters(tmp_path_factory.mktemp("adapters"))


def merge(
    recipe: dict[str, Any], output: Path, **options: Any
) -> tuple[Plan, dict[str, Any], dict[str, torch.Tensor]]:
    storage = open_storage()
    plan = make_plan(parse_recipe(recipe), storage, MergeOptions(**options), str(output))
    report = run_plan(plan, storage)
    return plan, report, load_merged(output)


def compare(
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    base: dict[str, torch.Tensor],
    tolerance: float,
) -> None:
    """Updates agree within a share of theirs, beside float32's rounding of the weights."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        origin = base[name].double()
        update = tensor.double() - origin
        difference = (found[name].double() - tensor.double()).norm()
        rounding = 2.0**-24 * origin.norm()
        assert difference <= tolerance * update.norm() + 4 * rounding, name


PARAMETERS: dict[str, dict[str, Any]] = {
    "consensus_ties": {"scope": "tensor"},  # adapters are trimmed over what they change
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "doge": {"density": 1.0, "steps": 20},
    "nearswap": {"t": 1e-3},
    "passthrough": {"scale": 0.5},
    "pcb": {"scope": "tensor"},
    "slerp": {"t": 0.3},
    "ties": {"density": 0.5},
    "wudi": {"steps": 50},
}


TAKE_ADAPTERS = {name for name, method in all_methods().items() if not method.calibrated}

TOLERANCES = {"arcee_fusion": 0.1, "consensus_ties": 0.1, "pcb": 0.1}
"""Methods that choose entries by a threshold may choose single ones otherwise."""

DECIDED_BY_ROUNDING = {"tsv_m", "iso_cts", "robust_merge"}
"""Of task vectors of low rank that are stored as whole weights, these use directions that only
rounding tells, of an adapter, TSV-M uses none; or factors, which an adapter has of its own."""


@pytest.mark.parametrize("method", sorted(TAKE_ADAPTERS - DECIDED_BY_ROUNDING))
def test_adapters_merge_to_what_their_checkpoints_merge_to(
    method: str, family: AdapterFamily, tmp_path: Path
) -> None:
    parameters = PARAMETERS.get(method, {})
    adapters: list[object] = list(family.adapters)
    if not all_methods()[method].needs_base:
        adapters = [f"{family.base}+{adapter}" for adapter in adapters]
    count = all_methods()[method].max_experts
    recipe = family.recipe(method, family.experts[:count], **parameters)
    _, _, expected = merge(recipe, tmp_path / "whole")
    plan, report, found = merge(
        family.recipe(method, adapters[:count], **parameters), tmp_path / "low"
    )
    compare(found, expected, family.base_state, TOLERANCES.get(method, 2e-4))
    assert report["bytes_read"] == plan.totals.bytes_read


# What is read, held and computed


def test_only_the_base_and_the_factors_are_read(family: AdapterFamily, tmp_path: Path) -> None:
    recipe = family.recipe("swudi_a", family.adapters)
    plan, report, _ = merge(recipe, tmp_path / "out")
    weights = sum(tensor.nbytes for tensor in family.base_state.values())
    factors = sum(
        tensor.nbytes
        for adapter in family.adapters
        for tensor in load_file(adapter / "adapter_model.safetensors").values()
    )
    assert report["bytes_read"] == plan.totals.bytes_read == weights + factors
    inputs = [(item.uri, item.role) for item in plan.inputs]
    assert inputs[0] == (str(family.base), "base")
    assert inputs[1:] == [(str(adapter), "expert") for adapter in family.adapters]


def test_adapters_of_one_model_without_a_base_read_it_once(
    family: AdapterFamily, tmp_path: Path
) -> None:
    models = [f"{family.base}+{adapter}" for adapter in family.adapters]
    plan, _, found = merge(family.recipe("linear", models), tmp_path / "out")
    alone, _, _ = merge(family.recipe("swudi_a", family.adapters), tmp_path / "other")
    assert plan.totals.bytes_read == alone.totals.bytes_read
    name = "model.layers.0.mlp.up_proj.weight"
    update = sum(updates[name] for updates in family.updates) / len(family.updates)
    expected = family.base_state[name].double() + update
    torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-7)


def test_what_no_adapter_changes_is_the_base_bit_by_bit(
    family: AdapterFamily, tmp_path: Path
) -> None:
    _, report, found = merge(
        family.recipe("swudi_a", family.adapters) | {"out_dtype": "bfloat16"}, tmp_path / "out"
    )
    unchanged = [n for n in found if not any(n in updates for updates in family.updates)]
    assert "lm_head.weight" in unchanged
    assert "model.layers.0.mlp.gate_proj.weight" in unchanged
    for name in unchanged:
        assert torch.equal(found[name], family.base_state[name]), name
    methods = {item["name"]: item["method"] for item in report["tensors"]}
    assert {methods[name] for name in unchanged} == {"copy"}


@pytest.mark.parametrize(
    "method", ["wudi", "wudi_cfs", "swudi", "swudi_a", "swudi_soft", "optmerge"]
)
def test_layers_are_solved_through_the_factors_where_that_is_cheaper(
    method: str, family: AdapterFamily, tmp_path: Path
) -> None:
    low, report, _ = merge(family.recipe(method, family.adapters), tmp_path / "low")
    storage = open_storage()
    recipe = parse_recipe(family.recipe(method, family.experts))
    whole = make_plan(recipe, storage, MergeOptions(), str(tmp_path / "whole"))
    assert {item["form"] for item in report["tensors"] if "form" in item} == {"factors"}
    assert low.totals.flops < whole.totals.flops
    assert low.totals.max_host_bytes < whole.totals.max_host_bytes


def test_a_gram_matrix_is_formed_where_ranks_add_up_to_more_than_columns(tmp_path: Path) -> None:
    family = make_adapters(tmp_path / "models", (40, 40), hidden=32)
    _, report, found = merge(family.recipe("swudi_a", family.adapters), tmp_path / "low")
    _, _, expected = merge(family.recipe("swudi_a", family.experts), tmp_path / "whole")
    compare(found, expected, family.base_state, 1e-3)
    forms = {item["name"]: item.get("form") for item in report["tensors"]}
    assert forms["model.layers.0.mlp.up_proj.weight"] == "gram"
    assert forms["model.layers.1.mlp.down_proj.weight"] == "factors", "one of 40 in 64 columns"


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "dare_ties"])
def test_bytes_do_not_depend_on_how_the_budget_cuts_tensors(method: str, tmp_path: Path) -> None:
    family = make_adapters(tmp_path / "models", (5, 3), hidden=512, layers=1, whole=False)
    models: list[object] = list(family.adapters)
    if method == "linear":
        models = [f"{family.base}+{adapter}" for adapter in models]
    recipe = family.recipe(method, models)
    outputs, counts = [], []
    for budget in ("4MiB", "1GiB"):
        output = tmp_path / f"out-{budget}"
        plan, report, _ = merge(recipe, output, memory_budget=budget)
        pieces = [list(cut_problems(plan.work(s.index, ""))) for s in plan.shards]
        counts.append(sum(map(len, pieces)))
        outputs.append(weight_bytes(output))
        assert report["bytes_read"] == plan.totals.bytes_read
    assert counts[0] > counts[1], "the small budget must really have cut tensors"
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("method", ["ties", "wudi", "swudi_a", "task_arithmetic"])
def test_buffers_stay_within_what_the_plan_says(method: str, tmp_path: Path) -> None:
    family = make_adapters(tmp_path / "models", (4, 4), hidden=512, layers=1, whole=False)
    recipe = family.recipe(method, family.adapters)
    storage = open_storage()
    free = make_plan(parse_recipe(recipe), storage, MergeOptions(), str(tmp_path / "out"))
    budget = free.totals.max_host_bytes + (6 << 20)  # results that wait to be written
    plan = make_plan(
        parse_recipe(recipe), storage, MergeOptions(memory_budget=budget), str(tmp_path / "out")
    )
    digest = plan.digest
    for shard in plan.shards:
        receipt = run_shard(plan.work(shard.index, digest), storage)
        assert receipt.peak_buffer_bytes <= budget


# Other kinds of experts


@pytest.mark.parametrize("method", ["task_arithmetic", "swudi_a", "wudi_cfs", "iso_wudi", "linear"])
def test_adapters_mix_with_whole_models_and_lie_on_other_models(
    method: str, family: AdapterFamily, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    state = tune(family.base_state, seed=5)
    config = json.loads((family.base / "config.json").read_text())
    write_checkpoint(other, state, config=config)
    both = {n: (t.double() + family.updates[2].get(n, 0)).float() for n, t in state.items()}
    write_checkpoint(tmp_path / "both", both, config=config)
    head = state["lm_head.weight"].float() * 1.01
    replaced = {
        n: (t.double() + family.updates[0].get(n, 0)).float() for n, t in family.base_state.items()
    } | {"lm_head.weight": head}
    write_checkpoint(tmp_path / "replaced", replaced, config=config)
    tensors = load_file(family.adapters[0] / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = head
    saved = write_adapter(tmp_path / "saved", tensors, modules_to_save=["lm_head"])
    first: object = saved
    if method == "linear":
        first = f"{family.base}+{saved}"
    models = [first, family.experts[1], f"{other}+{family.adapters[2]}"]
    whole = [tmp_path / "replaced", family.experts[1], tmp_path / "both"]
    plan, _, found = merge(family.recipe(method, models), tmp_path / "low")
    _, _, expected = merge(family.recipe(method, whole), tmp_path / "whole")
    compare(found, expected, family.base_state, 2e-4)
    assert plan.inputs[-1].uri == f"{other}+{family.adapters[2]}"


@pytest.mark.parametrize("method", ["wudi", "swudi_a", "task_arithmetic", "dare_linear"])
@pytest.mark.parametrize("budget", ["7MiB", "1GiB"])
def test_layers_stored_in_by_out_are_adapted(method: str, budget: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    name = "transformer.h.0.mlp.c_fc"
    stored = (0.02 * torch.randn((300, 700), generator=generator)).bfloat16()
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    state = {f"{name}.weight": stored}
    base = write_checkpoint(tmp_path / "base", state, config=config)
    adapters, whole = [], []
    for number in range(2):
        made = factors(name, 700, 300, 4, generator)
        down, up = (tensor.double() for tensor in made.values())
        expert = {f"{name}.weight": (stored.double() + 2 * (up @ down).t()).float()}
        folder = tmp_path / f"adapter-{number}"
        adapters.append(write_adapter(folder, made, fan_in_fan_out=True))
        whole.append(write_checkpoint(tmp_path / f"whole-{number}", expert, config=config))
    document = {"merge_method": method, "base_model": str(base), "out_dtype": "float32"}
    results = []
    for models in (adapters, whole):
        recipe = document | {"models": [{"model": str(model)} for model in models]}
        output = tmp_path / f"out-{len(results)}"
        results.append(merge(recipe, output, memory_budget=budget)[2])
    compare(results[0], results[1], state, 2e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_factors_may_be_stored_in_any_type(dtype: torch.dtype, tmp_path: Path) -> None:
    family = make_adapters(tmp_path / "models", (4, 2), factor_dtype=dtype, layers=1)
    for method in ("swudi_a", "ties"):
        _, _, found = merge(family.recipe(method, family.adapters), tmp_path / f"low-{method}")
        _, _, expected = merge(family.recipe(method, family.experts), tmp_path / f"w-{method}")
        compare(found, expected, family.base_state, 2e-4)


def test_the_result_has_the_type_of_the_models_and_not_of_adapters(
    family: AdapterFamily, tmp_path: Path
) -> None:
    tensors = load_file(family.adapters[0] / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = family.base_state["lm_head.weight"].float() * 1.01
    saved = write_adapter(tmp_path / "saved", tensors, modules_to_save=["lm_head"])
    recipe = family.recipe("swudi_a", [saved, family.adapters[1]])
    del recipe["out_dtype"]
    _, _, found = merge(recipe, tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    mean = (tensors["base_model.model.lm_head.weight"] + family.base_state["lm_head.weight"]) / 2
    torch.testing.assert_close(found["lm_head.weight"], mean.bfloat16())


# Warnings


def warnings(recipe: dict[str, Any], output: Path) -> list[str]:
    plan = make_plan(parse_recipe(recipe), open_storage(), MergeOptions(), str(output))
    return list(plan.warnings)


def test_trouble_that_is_known_of_adapters_is_told(family: AdapterFamily, tmp_path: Path) -> None:
    assert warnings(family.recipe("swudi_a", family.adapters), tmp_path / "out") == []
    [adam] = warnings(family.recipe("wudi", family.adapters), tmp_path / "out")
    assert "leaves the span of adapters" in adam
    assert warnings(family.recipe("wudi", family.experts), tmp_path / "out") == []
    tensors = load_file(family.adapters[0] / "adapter_model.safetensors")
    other = write_adapter(tmp_path / "other", tensors, base_model_name_or_path="org/other")
    [bases] = warnings(family.recipe("ties", [family.adapters[1], other]), tmp_path / "out")
    assert "different base models: 'models/base', 'org/other'" in bases


def test_an_embedding_that_takes_the_head_along_is_told(
    family: AdapterFamily, tmp_path: Path
) -> None:
    config = json.loads((family.base / "config.json").read_text()) | {"tie_word_embeddings": True}
    state = {n: t for n, t in family.base_state.items() if n != "lm_head.weight"}
    base = write_checkpoint(tmp_path / "tied", state, config=config)
    name = "base_model.model.model.embed_tokens"
    made = {
        f"{name}.lora_embedding_A": torch.ones(4, 256),
        f"{name}.lora_embedding_B": torch.ones(64, 4),
    }
    adapter = write_adapter(tmp_path / "adapter", made)
    recipe = family.recipe("ties", [adapter]) | {"base_model": str(base)}
    [told] = warnings(recipe, tmp_path / "out")
    assert "changes model.embed_tokens.weight, to which the head" in told


# Running


def test_a_sweep_of_adapters_gives_what_each_merge_gives(
    family: AdapterFamily, tmp_path: Path
) -> None:
    recipe = family.recipe("swudi_a", family.adapters)
    variants = [
        {"name": "plain"},
        {"name": "half", "parameters": {"scale": 0.5}},
        {"name": "closed", "merge_method": "wudi_cfs"},
    ]
    plan, report, _ = merge(recipe | {"sweep": variants}, tmp_path / "sweep")
    assert report["bytes_read"] == plan.totals.bytes_read
    for variant in variants:
        method = variant.get("merge_method", "swudi_a")
        parameters = variant.get("parameters", {})
        alone = tmp_path / f"alone-{variant['name']}"
        merge(family.recipe(str(method), family.adapters, **dict(parameters)), alone)
        assert weight_bytes(tmp_path / "sweep" / str(variant["name"])) == weight_bytes(alone)


def test_the_example_runs(
    family: AdapterFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, source in zip(("math", "code", "law"), family.adapters, strict=True):
        shutil.copytree(source, tmp_path / "adapters" / name)
    shutil.copytree(family.base, tmp_path / "models" / "base")
    shutil.copytree(family.experts[0], tmp_path / "models" / "chat")
    text = (REPOSITORY / "examples" / "recipes" / "adapters.yaml").read_text()
    storage = open_storage()
    run_plan(make_plan(parse_recipe(text), storage, MergeOptions(), "merged"), storage)
    assert load_merged(tmp_path / "merged").keys() == family.base_state.keys()


def test_bytes_do_not_depend_on_the_order_of_shards_and_published_ones_are_kept(
    family: AdapterFamily, tmp_path: Path
) -> None:
    recipe = family.recipe("swudi_a", family.adapters)
    plan, _, _ = merge(recipe, tmp_path / "once", max_shard_size="100kB")
    assert len(plan.shards) > 3
    storage = open_storage()
    other = make_plan(
        parse_recipe(recipe),
        storage,
        MergeOptions(max_shard_size="100kB"),
        str(tmp_path / "twice"),
    )
    digest = other.digest
    for shard in reversed(other.shards[1:]):
        work = msgspec.msgpack.encode(other.work(shard.index, digest))  # as workers get it
        run_shard(msgspec.msgpack.decode(work, type=ShardWork), storage)
    spent = [receipt_time(tmp_path / "twice", shard.file_name) for shard in other.shards[1:]]
    run_plan(other, storage)
    again = [receipt_time(tmp_path / "twice", shard.file_name) for shard in other.shards[1:]]
    assert again == spent
    assert weight_bytes(tmp_path / "once") == weight_bytes(tmp_path / "twice")


def receipt_time(folder: Path, file_name: str) -> int:
    return (folder / file_name).stat().st_mtime_ns


@pytest.mark.s3
def test_the_server_sends_exactly_the_planned_bytes(
    s3_env: S3Server, family: AdapterFamily, bucket: str, tmp_path: Path
) -> None:
    storage = open_storage()
    recipe = family.recipe("linear", [])
    base = upload_folder(s3_env, family.base, bucket, "base")
    for number, adapter in enumerate(family.adapters):
        uri = upload_folder(s3_env, adapter, bucket, f"adapters/{number}")
        recipe["models"].append({"model": f"{base}+{uri}"})
    options = MergeOptions(max_shard_size="200kB", memory_budget="16MiB")
    plan = make_plan(parse_recipe(recipe), storage, options, f"s3://{bucket}/merged")
    digest = plan.digest
    for shard in plan.shards:
        before = s3_env.bytes_sent(bucket)
        run_shard(plan.work(shard.index, digest), storage)
        assert s3_env.bytes_sent(bucket) - before == shard.bytes_read
    assert len(plan.shards) > 1
