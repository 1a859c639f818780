"""Several variants of one merge: inputs read once, common work done once, the same bytes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from merging.errors import Cancelled, CheckpointError, PlanError, RecipeError
from merging.execute.shard import run_shard
from merging.execute.shard_run import ShardCounts
from merging.local_run import run_plan
from merging.ops import adam, spectral
from merging.ops.problem import DenseProblem
from merging.options import MergeOptions
from merging.plan.plan import Plan, ShardWork
from merging.plan.planner import make_plan
from merging.publish import find_published, prepare_output, publish
from merging.receipts import Receipt
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from merging.verify import verify_published
from tests.support.adapters import make_adapters
from tests.support.checkpoints import Family, make_family
from tests.support.merges import load_merged, recipe, weight_bytes

FAMILY_VARIANTS: list[dict[str, Any]] = [
    {"name": "adam", "parameters": {"steps": 3}},
    {"name": "adam-slow", "parameters": {"steps": 3, "learning_rate": 1e-5}},
    {"name": "adam-half", "parameters": {"steps": 3, "scale": 0.5}},
    {"name": "ridge", "merge_method": "wudi_cfs", "parameters": {"rho": 0.3}},
    {"name": "omega", "merge_method": "wudi_cfs", "parameters": {"omega": 1e-5}},
    {"name": "filter", "merge_method": "swudi", "parameters": {"t": 100}},
    {"name": "soft", "merge_method": "swudi_soft", "parameters": {"t": 20}},
    {"name": "hard", "merge_method": "swudi_a"},
]


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(tmp_path / "models", num_experts=3, shards=2)


def sweep_plan(
    family: Family, output: Path, method: str, variants: list[dict[str, Any]], **options: Any
) -> Plan:
    document = {**recipe(family, method), "sweep": variants}
    return make_plan(parse_recipe(document), open_storage(), MergeOptions(**options), str(output))


def single_plan(
    family: Family, output: Path, method: str, variant: dict[str, Any], **options: Any
) -> Plan:
    document = recipe(family, variant.get("merge_method", method), **variant.get("parameters", {}))
    return make_plan(parse_recipe(document), open_storage(), MergeOptions(**options), str(output))


@pytest.mark.parametrize(
    ("method", "variants"),
    [
        ("wudi", FAMILY_VARIANTS),
        (
            "optmerge",
            [
                {"name": "a", "parameters": {"steps": 2}},
                {"name": "b", "parameters": {"steps": 2, "learning_rate": 1e-4}},
                {"name": "c", "parameters": {"variant": "lora"}},
                {"name": "d", "merge_method": "swudi_a"},
            ],
        ),
        (
            "ties",
            [
                {"name": "sparse", "parameters": {"density": 0.2}},
                {"name": "dense", "parameters": {"density": 0.7, "lambda": 0.5}},
                {"name": "dare", "merge_method": "dare_ties", "parameters": {"density": 0.5}},
            ],
        ),
        (
            "task_arithmetic",
            [{"name": f"l-{scale}", "parameters": {"lambda": scale}} for scale in (0.3, 0.5, 1.0)],
        ),
    ],
)
def test_each_variant_has_the_bytes_of_its_merge_by_itself(
    family: Family, tmp_path: Path, method: str, variants: list[dict[str, Any]]
) -> None:
    options = {"max_shard_size": "200KB", "memory_budget": "8MiB"}
    plan = sweep_plan(family, tmp_path / "sweep", method, variants, **options)
    assert len(plan.shards) > 1
    report = run_plan(plan, open_storage())
    for number, variant in enumerate(variants):
        name = variant["name"]
        alone = single_plan(family, tmp_path / "alone" / name, method, variant, **options)
        expected = run_plan(alone, open_storage())
        assert weight_bytes(tmp_path / "sweep" / name) == weight_bytes(tmp_path / "alone" / name)
        own = report["variants"][number]
        assert own["output"]["digest"] == expected["output"]["digest"]
        assert own["recipe_digest"] == expected["recipe_digest"]
        assert own["bytes_read"] == report["bytes_read"] == expected["bytes_read"]
        assert [_without_seconds(t) for t in own["tensors"]] == [
            _without_seconds(t) for t in expected["tensors"]
        ]
    assert report["output"]["uri"] == str(tmp_path / "sweep")
    assert report["totals"]["tensors"] == len(variants) * plan.totals.tensors
    assert not set(own) - set(report) - {"variant"}, (
        "what reads a merge's report can read a sweep's"
    )
    assert [v["name"] for v in report["output"]["variants"]] == [v["name"] for v in variants]


def _without_seconds(tensor: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tensor.items() if name != "seconds"}


def test_the_example_runs(family: Family, tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "examples/recipes/sweep.yaml").read_text()
    places = {"base": family.base, "chat": family.experts[0], "code": family.experts[1]}
    for name, folder in places.items():
        text = text.replace(f"s3://models/{name}", str(folder))
    plan = make_plan(parse_recipe(text), open_storage(), MergeOptions(), str(tmp_path / "out"))
    assert plan.warnings == ()
    report = run_plan(plan, open_storage())
    assert len({variant["output"]["digest"] for variant in report["variants"]}) == 4


def test_experts_are_summed_up_once_and_decomposed_once_a_layer(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = [
        {"name": "t-100", "parameters": {"t": 100}},
        {"name": "t-900", "parameters": {"t": 900, "r": 0.5}},
        {"name": "hard", "merge_method": "swudi_a"},
        {"name": "ridge", "merge_method": "wudi_cfs"},
    ]
    calls = count_calls(monkeypatch, (DenseProblem, "accumulate"), (spectral, "eigh"))
    plan = sweep_plan(family, tmp_path / "sweep", "swudi", variants)
    run_plan(plan, open_storage())
    num_layers = sum(
        plan.settings[problem.setting].method == "swudi"
        for shard in plan.shards
        for problem in shard.problems
    )
    assert num_layers == 14
    assert calls == {"accumulate": 3 * num_layers, "eigh": num_layers}


def test_variants_that_differ_in_scale_share_their_solution(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = [
        {"name": f"s-{scale}", "parameters": {"steps": 1, "scale": scale}} for scale in (0.3, 1, 2)
    ]
    calls = count_calls(monkeypatch, (adam, "adam_on_problem"))
    run_plan(sweep_plan(family, tmp_path / "sweep", "wudi", variants), open_storage())
    assert calls == {"adam_on_problem": 14}


def count_calls(monkeypatch: pytest.MonkeyPatch, *functions: tuple[Any, str]) -> Counter[str]:
    calls = Counter[str]()

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return real(*args, **options)

        return call

    for owner, name in functions:
        monkeypatch.setattr(owner, name, counting(name, getattr(owner, name)))
    return calls


def test_the_plan_counts_what_is_shared_once(family: Family, tmp_path: Path) -> None:
    variants = [{"name": f"t-{t}", "parameters": {"t": t}} for t in (100, 200, 300, 400)]
    plan = sweep_plan(family, tmp_path / "sweep", "swudi", variants)
    alone = single_plan(family, tmp_path / "alone", "swudi", variants[0])
    assert plan.totals.bytes_read == alone.totals.bytes_read
    assert plan.totals.bytes_written == 4 * alone.totals.bytes_written
    assert alone.totals.flops < plan.totals.flops < 2 * alone.totals.flops


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("wudi", [{"steps": n} for n in range(8)]),
        ("ties", [{"density": (n + 1) / 8} for n in range(8)]),
        ("task_arithmetic", [{"lambda": n / 8} for n in range(8)]),
    ],
)
def test_memory_stays_within_the_budget(
    family: Family, tmp_path: Path, method: str, parameters: list[dict[str, Any]]
) -> None:
    variants = [{"name": f"v{n}", "parameters": own} for n, own in enumerate(parameters)]
    needed = sweep_plan(family, tmp_path / "out", method, variants).totals.max_host_bytes
    budget = max(needed, 1 << 20)
    plan = sweep_plan(family, tmp_path / "out", method, variants, memory_budget=budget)
    assert run_plan(plan, open_storage())["peak_buffer_bytes"] <= budget


def test_an_interrupted_sweep_goes_on_from_its_receipts(family: Family, tmp_path: Path) -> None:
    output = tmp_path / "sweep"
    plan = sweep_plan(family, output, "wudi", FAMILY_VARIANTS[:3], max_shard_size="200KB")
    made: list[int] = []
    is_resumed = False

    def engine(work: ShardWork, *args: Any, **options: Any) -> Receipt:
        if len(made) == 2 and not is_resumed:
            raise Cancelled("Stopped here.")
        made.append(work.shard.index)
        return run_shard(work, *args, **options)

    with pytest.raises(Cancelled):
        run_plan(plan, open_storage(), engine=engine)
    assert not list(output.rglob("*.index.json"))
    (output / "adam-slow" / plan.shards[1].file_name).unlink()
    made.clear()
    is_resumed = True
    run_plan(plan, open_storage(), engine=engine)
    assert made == [1, 2], "a shard is done when the files of all its variants are there"
    expected = tmp_path / "expected"
    run_plan(
        sweep_plan(family, expected, "wudi", FAMILY_VARIANTS[:3], max_shard_size="200KB"),
        open_storage(),
    )
    for variant in FAMILY_VARIANTS[:3]:
        name = variant["name"]
        assert weight_bytes(output / name) == weight_bytes(expected / name)
    assert not list(output.rglob(".mergeyard"))


def test_a_shard_that_is_stopped_leaves_no_file_of_any_variant(
    family: Family, tmp_path: Path
) -> None:
    plan = sweep_plan(family, tmp_path / "sweep", "wudi", FAMILY_VARIANTS[:2])
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 5

    with pytest.raises(Cancelled):
        run_shard(plan.work(0, plan.digest), open_storage(), cancelled=cancelled)
    assert len(asked) == 6
    assert not list((tmp_path / "sweep").rglob("*.safetensors*"))


def test_progress_counts_the_bytes_of_all_variants(family: Family, tmp_path: Path) -> None:
    plan = sweep_plan(family, tmp_path / "sweep", "wudi", FAMILY_VARIANTS[:4])
    counts: list[ShardCounts] = []
    run_plan(plan, open_storage(), on_progress=lambda _, found: counts.append(found))
    assert counts[-1].bytes_read + counts[-1].bytes_written == (
        plan.totals.bytes_read + plan.totals.bytes_written
    )
    assert counts[-1].tensors_written == plan.totals.tensors


def test_checkpoints_of_a_sweep_appear_when_all_are_verified(
    family: Family, tmp_path: Path
) -> None:
    output = tmp_path / "sweep"
    plan = sweep_plan(family, output, "wudi", FAMILY_VARIANTS[:2])
    prepare_output(plan, open_storage())
    receipts = [run_shard(plan.work(0, plan.digest), open_storage())]
    file = output / "adam-slow" / plan.shards[0].file_name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="adam-slow"):
        publish(plan, receipts, open_storage())
    assert not list(output.rglob("*.index.json"))
    assert find_published(plan, open_storage()) is None
    receipts = [run_shard(plan.work(0, plan.digest), open_storage())]
    report = publish(plan, receipts, open_storage())
    assert find_published(plan, open_storage()) == report
    assert json.loads((output / "sweep_report.json").read_text()) == report
    for name in ("adam", "adam-slow"):
        assert verify_published(str(output / name), open_storage())
        index = json.loads((output / name / "model.safetensors.index.json").read_text())
        assert index["weight_map"]
        assert "## Recipe" in (output / name / "README.md").read_text()
        assert (output / name / "tokenizer.json").exists()


def test_a_variant_that_is_there_already_is_replaced_only_if_asked(
    family: Family, tmp_path: Path
) -> None:
    output = tmp_path / "sweep"
    run_plan(single_plan(family, output / "adam-slow", "linear", {}), open_storage())
    with pytest.raises(PlanError, match="adam-slow already holds a checkpoint") as caught:
        sweep_plan(family, output, "wudi", FAMILY_VARIANTS[:2])
    assert caught.value.code == "output_exists"
    plan = sweep_plan(family, output, "wudi", FAMILY_VARIANTS[:2], overwrite=True)
    report = run_plan(plan, open_storage())
    assert report["variants"][1]["method"] == "wudi"
    assert find_published(plan, open_storage()) == report


@pytest.mark.parametrize(
    ("method", "variant", "pointers", "says"),
    [
        ("wudi", {"merge_method": "ties"}, "/sweep/1 /sweep/1", "do not merge the same tensors"),
        ("wudi", {"parameters": {"touch": "matrices"}}, "/sweep/1", "Give the recipe a 'touch'"),
        ("wudi", {"parameters": {"rest": "base"}}, "/sweep/1", "that they do not merge"),
        ("swudi", {"parameters": {"touch": ["q_proj"]}}, "/sweep/1", "down_proj.weight"),
    ],
)
def test_variants_must_have_one_layout(
    family: Family,
    tmp_path: Path,
    method: str,
    variant: dict[str, Any],
    pointers: str,
    says: str,
) -> None:
    variants = [{"name": "first"}, {"name": "second", **variant}]
    with pytest.raises(RecipeError, match=says) as caught:
        sweep_plan(family, tmp_path / "sweep", method, variants)
    assert caught.value.code == "incompatible_options"
    assert [fault.pointer for fault in caught.value.faults] == pointers.split()


def test_other_methods_may_share_a_layout_that_the_recipe_names(
    family: Family, tmp_path: Path
) -> None:
    document = {
        **recipe(family, "wudi", touch="linear", rest="mean", steps=2),
        "sweep": [{"name": "a"}, {"name": "b", "merge_method": "ties"}],
    }
    plan = make_plan(
        parse_recipe(document), open_storage(), MergeOptions(), str(tmp_path / "sweep")
    )
    run_plan(plan, open_storage())
    alone = single_plan(
        family,
        tmp_path / "alone",
        "ties",
        {"parameters": {"touch": "linear", "rest": "mean"}},
    )
    run_plan(alone, open_storage())
    assert weight_bytes(tmp_path / "sweep" / "b") == weight_bytes(tmp_path / "alone")


def test_parameters_that_go_wrong_for_a_tensor_name_the_variant(
    family: Family, tmp_path: Path
) -> None:
    density = [{"filter": "mlp", "value": 0.5}]
    variants = [{"name": "a"}, {"name": "b", "parameters": {"steps": density}}]
    sweep_plan(family, tmp_path / "ok", "wudi", variants[:1])
    with pytest.raises(RecipeError) as caught:
        sweep_plan(family, tmp_path / "sweep", "wudi", variants)
    assert caught.value.faults[0].pointer.startswith("/sweep/1")


def test_a_plan_without_variants_says_nothing_of_them(family: Family, tmp_path: Path) -> None:
    plan = single_plan(family, tmp_path / "out", "wudi", {})
    assert plan.merges() == (plan,)
    assert plan.checkpoint_uris == (plan.output_uri,)
    assert Plan.from_json(plan.to_json()) == plan
    swept = sweep_plan(family, tmp_path / "sweep", "wudi", FAMILY_VARIANTS)
    assert Plan.from_json(swept.to_json()) == swept
    assert swept.digest != plan.digest


@pytest.mark.parametrize("others", [["wudi", "swudi"], ["optmerge"], ["wudi", "optmerge"]])
def test_adapters_are_merged_in_variants_too(tmp_path: Path, others: list[str]) -> None:
    family = make_adapters(tmp_path / "models", whole=False)
    document = family.recipe("swudi_a", family.adapters)
    variants = [{"name": "swudi_a"}, *({"name": name, "merge_method": name} for name in others)]
    storage, options = open_storage(), MergeOptions()
    swept = {**document, "sweep": variants}
    plan = make_plan(parse_recipe(swept), storage, options, str(tmp_path / "sweep"))
    budgeted = MergeOptions(memory_budget=max(plan.totals.max_host_bytes, 1 << 20))
    plan = make_plan(parse_recipe(swept), storage, budgeted, str(tmp_path / "sweep"))
    assert run_plan(plan, storage)["peak_buffer_bytes"] <= budgeted.memory_budget
    for name in ["swudi_a", *others]:
        alone = family.recipe(name, family.adapters)
        run_plan(make_plan(parse_recipe(alone), storage, options, str(tmp_path / name)), storage)
        if "optmerge" not in others:
            assert weight_bytes(tmp_path / "sweep" / name) == weight_bytes(tmp_path / name)
        expected = load_merged(tmp_path / name)
        # Beside a method that takes no adapters, all variants get them expanded.
        for tensor_name, found in load_merged(tmp_path / "sweep" / name).items():
            torch.testing.assert_close(found, expected[tensor_name], rtol=1e-4, atol=2e-6)
