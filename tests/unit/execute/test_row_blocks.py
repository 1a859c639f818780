"""Layers that are solved in blocks of rows because the budget says so."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from merging.errors import PlanError
from merging.execute.shard import run_shard
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.checkpoints import tune, write_checkpoint
from tests.support.merges import load_merged, weight_bytes

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """A base and two experts with a layer much higher than wide and a small one."""
    generator = torch.Generator().manual_seed(0)
    base = {
        UP: 0.02 * torch.randn(1000, 96, generator=generator),
        DOWN: 0.02 * torch.randn(96, 128, generator=generator),
    }
    states = [base, tune(base, seed=1), tune(base, seed=2)]
    return [str(write_checkpoint(tmp_path / f"model-{n}", s)) for n, s in enumerate(states)]


def plan(models: list[str], output: Path, method: str = "wudi", **options: object) -> Plan:
    base, *experts = models
    document = {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": expert} for expert in experts],
    }
    options = {"max_shard_size": 400_000, **options}
    return make_plan(
        parse_recipe(document), open_storage(), MergeOptions.model_validate(options), str(output)
    )


def row_blocks(found: Plan) -> dict[str, int]:
    return {p.tensor_name: p.row_block for shard in found.shards for p in shard.problems}


def smallest_budget(models: list[str], output: Path) -> int:
    """What is needed if rows are solved in the smallest blocks."""
    with pytest.raises(PlanError) as caught:
        plan(models, output, memory_budget=1 << 20)
    return int(caught.value.context["needed_bytes"])


def test_a_layer_solved_in_blocks_of_rows_is_the_whole_solution_but_for_rounding(
    models: list[str], tmp_path: Path
) -> None:
    whole = plan(models, tmp_path / "whole")
    assert row_blocks(whole) == {UP: 0, DOWN: 0}
    run_plan(whole, open_storage())
    expected = load_merged(tmp_path / "whole")
    least = smallest_budget(models, tmp_path / "out")
    most = whole.totals.max_host_bytes - 1
    used = set()
    for budget in (least, (least + most) // 2, most):
        output = tmp_path / f"out-{budget}"
        blocked = plan(models, output, memory_budget=budget)
        used.add(row_blocks(blocked)[UP])
        report = run_plan(blocked, open_storage())
        assert report["peak_buffer_bytes"] <= budget
        for name, tensor in load_merged(output).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-8)
    assert len(used) == 3
    assert all(0 < block < 1000 and block % 64 == 0 for block in used)


def test_the_same_plan_gives_the_same_bytes_in_any_order_and_company(
    models: list[str], tmp_path: Path
) -> None:
    outputs = []
    budget = smallest_budget(models, tmp_path / "out")
    for order in (1, -1):
        output = tmp_path / f"out{order}"
        blocked = plan(models, output, memory_budget=budget)
        assert len(blocked.shards) == 2
        assert row_blocks(blocked)[UP] > 0
        for shard in blocked.shards[::order]:
            run_shard(blocked.work(shard.index, blocked.digest), open_storage())
        outputs.append(weight_bytes(output))
    assert outputs[0] == outputs[1]


def test_the_block_is_part_of_the_plan_and_not_of_the_worker(
    models: list[str], tmp_path: Path
) -> None:
    """A worker with room for the whole layer solves it in the planned blocks all the same."""
    budget = smallest_budget(models, tmp_path / "out")
    blocked = plan(models, tmp_path / "small", memory_budget=budget)
    roomy = msgspec.structs.replace(
        blocked, memory_budget=1 << 30, output_uri=str(tmp_path / "roomy")
    )
    for found in (blocked, roomy):
        for shard in found.shards:
            run_shard(found.work(shard.index, found.digest), open_storage())
    assert weight_bytes(tmp_path / "small") == weight_bytes(tmp_path / "roomy")


def test_a_plan_for_gpus_is_not_solved_on_a_cpu_without_the_memory(
    models: list[str], tmp_path: Path
) -> None:
    least = smallest_budget(models, tmp_path / "out")
    made = plan(models, tmp_path / "out", memory_budget=least - 1, device_memory_budget="1GiB")
    assert row_blocks(made) == {UP: 0, DOWN: 0}, "the GPU holds the whole layer"
    with pytest.raises(PlanError, match="workers with a GPU") as caught:
        run_plan(made, open_storage())
    assert caught.value.code == "does_not_fit"
    assert caught.value.context["tensor_name"] == UP


def test_a_plan_for_gpus_that_fits_a_cpu_as_well_runs_there(
    models: list[str], tmp_path: Path
) -> None:
    made = plan(models, tmp_path / "out", device_memory_budget="1GiB")
    run_plan(made, open_storage())
    assert set(load_merged(tmp_path / "out")) == {UP, DOWN}
