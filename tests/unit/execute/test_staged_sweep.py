"""Variants of methods that take several passes: inputs read once a pass, the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merging.errors import Cancelled, RecipeError
from merging.execute.shard import run_shard
from merging.local_run import run_plan
from merging.ops import isotropic
from merging.options import MergeOptions
from merging.plan.plan import Plan, ShardWork, workspace_uri
from merging.plan.planner import make_plan
from merging.receipts import Receipt
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.checkpoints import Family, make_family
from tests.support.merges import recipe, weight_bytes

GLOBAL = {"scope": "global"}
SVC = {"svc": 0.5}
HALF = [{"filter": "mlp", "value": 0.5}, {"value": 0.1}]


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return make_family(tmp_path / "models", num_experts=3, shards=2)


def plan_of(document: dict[str, Any], output: Path, **options: Any) -> Plan:
    return make_plan(parse_recipe(document), open_storage(), MergeOptions(**options), str(output))


def sweep(family: Family, method: str, variants: list[dict[str, Any]]) -> dict[str, Any]:
    """Of ``method`` in one variant after the other, or of what ``merge_method`` says."""
    named = [{"name": f"v{number}", **variant} for number, variant in enumerate(variants)]
    return {**recipe(family, method), "sweep": named}


def alone(family: Family, method: str, variant: dict[str, Any]) -> dict[str, Any]:
    return recipe(family, variant.get("merge_method", method), **variant.get("parameters", {}))


def of(**parameters: Any) -> dict[str, Any]:
    return {"parameters": parameters}


@pytest.mark.parametrize(
    ("method", "variants"),
    [
        ("ties", [of(scope="global", density=density) for density in (0.2, 0.5, 1.0)]),
        ("ties", [of(density=0.2), of(**GLOBAL, density=0.2)]),
        ("ties", [of(**GLOBAL, density=0.4), of(**GLOBAL, density=HALF)]),
        ("ties", [of(**GLOBAL), {"merge_method": "consensus_ties", **of(**GLOBAL)}]),
        ("pcb", [of(**GLOBAL, ratio=0.2), of(**GLOBAL, ratio=0.4)]),
        ("doge", [of(steps=2), of(steps=2, density=0.5)]),
        ("opcm", [of(alpha=0.3), of(alpha=0.7), of(alpha=0.7)]),
        ("iso_c", [of(), of(scale=1.3), {"merge_method": "tsv_m"}, {"merge_method": "dc_merge"}]),
        ("iso_c", [of(scale=1.0), of(scale=2.0), of()]),
        ("iso_wudi", [of(), of(scale=0.7), {"merge_method": "iso_c"}]),
        ("iso_c", [of(**SVC), of(scale=0.5, **SVC)]),
        ("task_arithmetic", [of(**SVC), {"merge_method": "ties", **of(**SVC)}]),
        ("wudi", [of(steps=2, **SVC), {"merge_method": "swudi_a", **of(**SVC)}]),
    ],
)
def test_each_variant_has_the_bytes_of_its_merge_by_itself(
    family: Family, tmp_path: Path, method: str, variants: list[dict[str, Any]]
) -> None:
    options = {"max_shard_size": "200KB", "memory_budget": "16MiB"}
    plan = plan_of(sweep(family, method, variants), tmp_path / "sweep", **options)
    report = run_plan(plan, open_storage())
    assert report["bytes_read"] == plan.totals.bytes_read
    assert report["bytes_intermediate"] == plan.totals.bytes_intermediate > 0
    assert report["peak_buffer_bytes"] <= plan.memory_budget
    for number, variant in enumerate(variants):
        single = plan_of(alone(family, method, variant), tmp_path / f"v{number}", **options)
        expected = run_plan(single, open_storage())
        assert weight_bytes(tmp_path / "sweep" / f"v{number}") == weight_bytes(
            tmp_path / f"v{number}"
        )
        own = report["variants"][number]
        assert own["output"]["digest"] == expected["output"]["digest"]
        assert [t["method"] for t in own["tensors"]] == [t["method"] for t in expected["tensors"]]
    assert not (tmp_path / "sweep" / ".mergeyard").exists()


@pytest.mark.parametrize(
    ("method", "variants"),
    [
        ("ties", [of(**GLOBAL, density=density / 10) for density in (2, 4, 6)]),
        ("iso_c", [of(), {"merge_method": "tsv_m"}]),
        ("task_arithmetic", [of(**SVC), of(**SVC, **{"lambda": 0.5})]),
    ],
)
def test_inputs_are_read_as_often_as_for_one_variant(
    family: Family, tmp_path: Path, method: str, variants: list[dict[str, Any]]
) -> None:
    swept = plan_of(sweep(family, method, variants), tmp_path / "sweep")
    single = plan_of(alone(family, method, variants[0]), tmp_path / "alone")
    assert bytes_of_inputs(swept) == bytes_of_inputs(single)
    assert len(swept.shards) == len(single.shards)


def bytes_of_inputs(plan: Plan) -> int:
    return sum(
        source.num_bytes
        for shard in plan.shards
        for problem in shard.problems
        for source in problem.sources
        if plan.files[source.file].shard is None
    )


def test_variants_that_differ_in_scale_share_their_updates(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decomposed: list[int] = []
    real = isotropic.flatten_spectrum

    def counting(*args: Any) -> Any:
        decomposed.append(1)
        return real(*args)

    monkeypatch.setattr(isotropic, "flatten_spectrum", counting)
    variants = [of(), *(of(scale=scale) for scale in (0.5, 1.0, 2.0))]
    swept = plan_of(sweep(family, "iso_c", variants), tmp_path / "sweep")
    single = plan_of(alone(family, "iso_c", of()), tmp_path / "alone")
    run_plan(swept, open_storage())
    assert len(decomposed) == 14
    assert bytes_of_inputs(swept) == bytes_of_inputs(single)
    assert swept.shards[0].bytes_written == single.shards[0].bytes_written


@pytest.mark.parametrize(
    ("method", "variants", "budget"),
    [
        ("ties", [of(**GLOBAL, density=(n + 1) / 8) for n in range(8)], "32MiB"),
        ("opcm", [of(alpha=(n + 1) / 16) for n in range(8)], "80MiB"),
        ("karcher", [of(max_iter=n + 1) for n in range(8)], "20MiB"),
    ],
)
def test_memory_stays_within_the_budget(
    tmp_path: Path, method: str, variants: list[dict[str, Any]], budget: str
) -> None:
    """With embeddings of 1.5 million entries, which are several tiles in such a budget."""
    family = make_family(tmp_path / "models", num_experts=3, vocab=24_576)
    plan = plan_of(sweep(family, method, variants), tmp_path / "out", memory_budget=budget)
    assert run_plan(plan, open_storage())["peak_buffer_bytes"] <= plan.memory_budget
    single = plan_of(alone(family, method, variants[3]), tmp_path / "alone")
    run_plan(single, open_storage())
    assert weight_bytes(tmp_path / "out" / "v3") == weight_bytes(tmp_path / "alone")


@pytest.mark.parametrize(
    ("method", "variants", "pointer", "says"),
    [
        (
            "ties",
            [of(density=0.2), of(**GLOBAL, density=0.2), {"merge_method": "dare_ties"}],
            "/sweep/2",
            r"'v1' \(ties\) takes several passes .*'v2' \(dare_ties\) does not take the same",
        ),
        (
            "ties",
            [of(**GLOBAL, density=0.2), of(rescale=True, density=0.2)],
            "/sweep/1",
            "does not take the same",
        ),
        (
            "ties",
            [of(**GLOBAL, density=0.2), {"merge_method": "pcb", **of(**GLOBAL)}],
            "/sweep/1",
            "does not take the same",
        ),
        ("ties", [of(), of(**SVC)], "/sweep/1", "others of this sweep do without it"),
        ("emr", [of(), of(**{"lambda": 0.5})], "/sweep/0", "publishes masks"),
    ],
)
def test_what_variants_cannot_share_is_refused(
    family: Family,
    tmp_path: Path,
    method: str,
    variants: list[dict[str, Any]],
    pointer: str,
    says: str,
) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        plan_of(sweep(family, method, variants), tmp_path / "sweep")
    assert caught.value.faults[0].pointer == pointer
    assert {fault.code for fault in caught.value.faults} == {"incompatible_options"}


def test_methods_that_run_the_merged_model_are_refused(family: Family, tmp_path: Path) -> None:
    document = sweep(family, "regmean_plus_plus", [of(), of(alpha=0.5)])
    with pytest.raises(RecipeError, match="runs the merged model, block after block") as caught:
        plan_of({**document, "calibration": {"data": [[1, 2, 3]]}}, tmp_path / "sweep")
    assert [fault.pointer for fault in caught.value.faults] == ["/sweep/0", "/sweep/1"]


def test_a_variants_lost_intermediate_file_is_made_again_with_the_others(
    family: Family, tmp_path: Path
) -> None:
    variants = [of(alpha=0.3), of(alpha=0.7)]
    output, storage = tmp_path / "sweep", open_storage()
    plan = plan_of(sweep(family, "opcm", variants), output)
    [maps, combined, merged] = plan.shards
    made: list[int] = []

    def engine(work: ShardWork, *args: Any, **options: Any) -> Receipt:
        if len(made) == 2:
            raise Cancelled("Stopped here.")
        made.append(work.shard.index)
        return run_shard(work, *args, **options)

    with pytest.raises(Cancelled):
        run_plan(plan, storage, engine=engine)
    assert made == [maps.index, combined.index]
    workspace = Path(workspace_uri(str(output), plan.digest))
    files = {f"v{number}/{maps.file_name}" for number in range(2)} | {combined.file_name}
    assert {str(p.relative_to(workspace)) for p in workspace.rglob("*.safetensors")} == files
    (workspace / "v1" / maps.file_name).unlink()
    made.clear()
    run_plan(plan, storage, engine=engine)
    assert made == [maps.index, merged.index]
