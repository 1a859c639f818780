"""Methods that need values over many tensors, through plan and shards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merging.errors import PlanError
from merging.execute.shard import run_shard
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.plan.stages import shards_needed
from merging.publish import prepare_output, publish
from merging.receipts import Receipt
from merging.recipe import parse_recipe
from merging.storage.base import Storage
from merging.storage.router import open_storage
from tests.support import oracle
from tests.support.checkpoints import Family, make_family
from tests.support.merges import load_merged, recipe, weight_bytes

DENSITIES = [0.2, 0.5, 1.0]
SMALL_BUDGET = "24MiB"


@pytest.fixture(scope="module")
def storage() -> Storage:
    return open_storage()


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Family]:
    """With embeddings of 1.5 million entries, which are several tiles in a small budget."""
    folder = tmp_path_factory.mktemp("models")
    return {
        dtype: make_family(folder / str(dtype), num_experts=3, vocab=24_576, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }


def plan_ties(family: Family, storage: Storage, output: Path, scope: str, **options: Any) -> Plan:
    document = recipe(family, "ties", scope=scope)
    for model, density in zip(document["models"], DENSITIES, strict=True):
        model["parameters"] = {"density": density}
    return make_plan(parse_recipe(document), storage, MergeOptions(**options), str(output))


def model_wide_thresholds(family: Family) -> list[float]:
    """The paper's: the k-th smallest magnitude of the whole task vector as one long vector."""
    thresholds = []
    for state, density in zip(family.expert_states, DENSITIES, strict=True):
        vectors = [
            (state[name].float() - base.float()).abs().view(-1)
            for name, base in family.base_state.items()
        ]
        whole = torch.cat(vectors)
        rank = whole.numel() - int(density * whole.numel())
        thresholds.append(float(torch.kthvalue(whole, rank).values) if rank else 0.0)
    return thresholds


def expected_global(family: Family) -> dict[str, np.ndarray]:
    thresholds = model_wide_thresholds(family)
    merged = {}
    for name, base in family.base_state.items():
        trimmed = []
        for state, threshold in zip(family.expert_states, thresholds, strict=True):
            vector = state[name].float() - base.float()
            trimmed.append((vector * (vector.abs() >= threshold)).double().numpy())
        merged[name] = oracle.mix(base, trimmed, [1.0] * 3, scale=1.0, normalize=True, elect=True)
    return merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_global_trim_is_the_papers(
    families: dict[torch.dtype, Family], storage: Storage, tmp_path: Path, dtype: torch.dtype
) -> None:
    family = families[dtype]
    plan = plan_ties(family, storage, tmp_path / "out", "global")
    run_plan(plan, storage)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    for name, expected in expected_global(family).items():
        found = load_merged(tmp_path / "out")[name].double().numpy()
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=1e-7)


def test_every_pass_reads_the_inputs_once_and_the_plan_says_so(
    families: dict[torch.dtype, Family], storage: Storage, tmp_path: Path
) -> None:
    family = families[torch.float32]
    plain = plan_ties(family, storage, tmp_path / "plain", "tensor")
    plan = plan_ties(family, storage, tmp_path / "out", "global")
    report = run_plan(plan, storage)
    assert report["bytes_read"] == plan.totals.bytes_read
    inputs = {number for number, file in enumerate(plan.files) if file.shard is None}
    of_inputs = sum(
        source.num_bytes
        for shard in plan.shards
        for problem in shard.problems
        for source in problem.sources
        if source.file in inputs
    )
    assert of_inputs == 3 * plain.totals.bytes_read
    assert plan.totals.tensors == plain.totals.tensors == len(report["tensors"])
    assert not (tmp_path / "out" / ".mergeyard").exists()


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_bytes_do_not_depend_on_budget_order_or_cuts(
    families: dict[torch.dtype, Family], storage: Storage, tmp_path: Path, scope: str
) -> None:
    """With a small budget the embedding's threshold of ``tensor`` is found by a reduction."""
    family = families[torch.float32]
    found = []
    for number, options in enumerate(
        [{}, {"memory_budget": SMALL_BUDGET}, {"memory_budget": SMALL_BUDGET}]
    ):
        output = tmp_path / f"out-{number}"
        plan = plan_ties(family, storage, output, scope, max_shard_size="8MB", **options)
        if number < 2:
            run_plan(plan, storage)
        else:
            run_backwards(plan, storage)
        found.append(weight_bytes(output))
    assert len(found[0]) > 1
    assert found[0] == found[1] == found[2]


def run_backwards(plan: Plan, storage: Storage) -> None:
    """Always the last shard that can be worked on; what each one needs still comes first."""
    versions: dict[int, tuple[str, ...]] = {}
    needed = shards_needed(plan)
    while len(versions) < len(plan.shards):
        index = max(
            shard.index
            for shard in plan.shards
            if shard.index not in versions and needed[shard.index] <= versions.keys()
        )
        work = plan.work(index, plan.digest, {i: versions[i] for i in needed[index]})
        versions[index] = run_shard(work, storage).versions


def test_a_tensor_that_fits_is_trimmed_in_one_pass(
    families: dict[torch.dtype, Family], storage: Storage, tmp_path: Path
) -> None:
    family = families[torch.float32]
    assert plan_ties(family, storage, tmp_path / "a", "tensor").outputs[0].index == 0
    plan = plan_ties(family, storage, tmp_path / "b", "tensor", memory_budget=SMALL_BUDGET)
    names = {
        problem.tensor_name
        for shard in plan.shards
        for problem in shard.problems
        if plan.settings[problem.setting].step == "coarse-counts"
    }
    assert names == {"model.embed_tokens.weight", "lm_head.weight"}
    receipts = receipts_of(plan, storage)
    assert max(receipt.peak_buffer_bytes for receipt in receipts) <= plan.memory_budget


def test_what_does_not_fit_in_tiles_either_is_refused(
    families: dict[torch.dtype, Family], storage: Storage, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="bytes of host memory"):
        plan_ties(
            families[torch.float32], storage, tmp_path / "out", "tensor", memory_budget="1MiB"
        )


IN_TILES: dict[str, tuple[str, dict[str, Any], int]] = {
    "ties": ("ties", {"density": 0.5}, 3),
    "ties, rescaled": ("ties", {"density": 0.5, "rescale": True}, 4),
    "breadcrumbs": ("breadcrumbs", {"density": 0.7, "gamma": 0.05}, 3),
    "breadcrumbs that drop nothing": ("breadcrumbs", {"density": 0.7, "gamma": 0.0}, 3),
    "breadcrumbs, rescaled": ("breadcrumbs", {"density": 0.7, "rescale": True}, 4),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"density": 0.3, "gamma": 0.9}, 3),
    "della": ("della", {"density": 0.5}, 2),
    "della without rescaling": ("della", {"density": 0.5, "rescale": False}, 1),
    "della_linear": ("della_linear", {"density": 0.5, "epsilon": 0.0}, 2),
    "sce": ("sce", {"select_topk": 0.3}, 4),
    "sce of all entries": ("sce", {"select_topk": 1.0}, 2),
    "sce of no entries": ("sce", {"select_topk": 0.0}, 4),
}
"""Methods and parameters, and how often a tensor that is worked on in tiles is read."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", IN_TILES)
def test_a_tensor_larger_than_the_budget_has_the_same_bytes(
    families: dict[torch.dtype, Family],
    storage: Storage,
    tmp_path: Path,
    case: str,
    dtype: torch.dtype,
) -> None:
    family = families[dtype]
    method, parameters, num_readings = IN_TILES[case]
    document = recipe(family, method, **parameters)
    found = []
    for number, budget in enumerate(["1GiB", SMALL_BUDGET, "18MiB"]):
        options = MergeOptions(memory_budget=budget)
        plan = make_plan(parse_recipe(document), storage, options, str(tmp_path / str(number)))
        receipts = receipts_of(plan, storage)
        if number < 2:  # what is just enough may wait for nothing that is still being written
            assert max(receipt.peak_buffer_bytes for receipt in receipts) <= plan.memory_budget
        publish(plan, receipts, storage)
        found.append(weight_bytes(tmp_path / str(number)))
    assert found[0] == found[1] == found[2]
    readings = [
        problem.sources[1]
        for shard in plan.shards
        for problem in shard.problems
        if problem.base is not None and "embed_tokens" in problem.tensor_name
    ]
    assert len(readings) == num_readings


def receipts_of(plan: Plan, storage: Storage) -> list[Receipt]:
    prepare_output(plan, storage)
    receipts: list[Receipt] = []
    for shard, needed in zip(plan.shards, shards_needed(plan), strict=True):
        versions = {i: receipts[i].versions for i in needed}
        receipts.append(run_shard(plan.work(shard.index, plan.digest, versions), storage))
    return receipts


@pytest.mark.parametrize("method", ["sce", "breadcrumbs"])
def test_experts_that_are_the_base_give_the_base_in_tiles(
    families: dict[torch.dtype, Family], storage: Storage, tmp_path: Path, method: str
) -> None:
    family = families[torch.float32]
    document = recipe(family, method, **({"select_topk": 0.5} if method == "sce" else {}))
    for model in document["models"]:
        model["model"] = str(shutil.copytree(family.base, tmp_path / "copy", dirs_exist_ok=True))
        model["parameters"] = {} if method == "sce" else {"density": 0.5}
    options = MergeOptions(memory_budget="18MiB")
    run_plan(make_plan(parse_recipe(document), storage, options, str(tmp_path / "out")), storage)
    for name, tensor in load_merged(tmp_path / "out").items():
        assert torch.equal(tensor, family.base_state[name])


def test_tensors_of_other_densities_have_thresholds_of_their_own(
    families: dict[torch.dtype, Family], storage: Storage, tmp_path: Path
) -> None:
    family = families[torch.float32]
    document = recipe(family, "ties", scope="global")
    document["parameters"]["density"] = [{"filter": "mlp", "value": 0.1}, {"value": 0.4}]
    plan = make_plan(parse_recipe(document), storage, MergeOptions(), str(tmp_path / "out"))
    combined = [
        problem
        for shard in plan.shards
        for problem in shard.problems
        if plan.settings[problem.setting].step == "coarse-counts.combined"
    ]
    assert sorted(len(problem.experts) for problem in combined) == [6, 15]
