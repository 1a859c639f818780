"""One layer divided over several workers."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.plan.stages import shards_needed
from merging.plan.timing import estimate_seconds
from merging.recipe import parse_recipe
from merging.storage.base import Storage
from merging.storage.router import open_storage
from tests.support.checkpoints import Family, make_family, write_checkpoint
from tests.support.merges import recipe, weight_bytes
from tests.support.rates import rates

DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def storage() -> Storage:
    return open_storage()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """One block of a model: its MLP takes most of the operations."""
    folder = tmp_path_factory.mktemp("models")
    return make_family(folder, num_experts=3, hidden=192, layers=1, dtype=torch.bfloat16)


def plan_wudi(
    family: Family, storage: Storage, output: Path, method: str = "wudi", **options: object
) -> Plan:
    document = recipe(family, method)
    return make_plan(parse_recipe(document), storage, MergeOptions(**options), str(output))


def with_row_blocks(plan: Plan, blocks: dict[str, int]) -> Plan:
    """The plan with other blocks of rows for some tensors."""
    shards = tuple(
        msgspec.structs.replace(
            shard,
            problems=tuple(
                msgspec.structs.replace(
                    problem, row_block=blocks.get(problem.tensor_name, problem.row_block)
                )
                for problem in shard.problems
            ),
        )
        for shard in plan.shards
    )
    return msgspec.structs.replace(plan, shards=shards)


def row_blocks(plan: Plan) -> dict[str, int]:
    """Of the tensors that are divided."""
    return {
        problem.tensor_name: problem.row_block
        for shard in plan.shards
        for problem in shard.problems
        if plan.settings[problem.setting].step == "rows"
    }


def test_a_divided_layer_has_the_bits_of_the_undivided_one(
    family: Family, storage: Storage, tmp_path: Path
) -> None:
    plan = plan_wudi(family, storage, tmp_path / "divided", workers=6)
    blocks = row_blocks(plan)
    assert DOWN in blocks
    divided = run_plan(plan, storage)
    whole = plan_wudi(family, storage, tmp_path / "whole")
    undivided = run_plan(with_row_blocks(whole, blocks), storage)
    assert weight_bytes(tmp_path / "divided") == weight_bytes(tmp_path / "whole")
    assert divided["bytes_read"] == plan.totals.bytes_read > whole.totals.bytes_read
    for found, expected in zip(divided["tensors"], undivided["tensors"], strict=True):
        for key in ("seconds", *(("flops",) if found["name"] not in blocks else ())):
            found.pop(key, None)
            expected.pop(key, None)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            same = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            assert found[name] == same, (found["name"], name)
    assert divided["totals"]["layers_solved"] == undivided["totals"]["layers_solved"]


def test_bytes_do_not_depend_on_the_order(family: Family, storage: Storage, tmp_path: Path) -> None:
    from tests.unit.execute.test_reductions import run_backwards

    plan = plan_wudi(family, storage, tmp_path / "a", workers=6)
    run_plan(plan, storage)
    run_backwards(plan_wudi(family, storage, tmp_path / "b", workers=6), storage)
    assert weight_bytes(tmp_path / "a") == weight_bytes(tmp_path / "b")


def test_dividing_shortens_the_estimate_and_the_plan_says_so(
    family: Family, storage: Storage, tmp_path: Path
) -> None:
    plan = plan_wudi(family, storage, tmp_path / "divided", workers=6)
    [told] = [text for text in plan.warnings if text.startswith(DOWN)]
    assert "divided over 3 workers, in blocks of 64 rows" in told
    fast = {"file": 1e9}
    known = rates(read=fast, written=fast, operations=1e9, entries=1e9)
    divided = estimate_seconds(plan, known, 6)
    alone = estimate_seconds(plan_wudi(family, storage, tmp_path / "whole"), known, 6)
    assert divided is not None
    assert alone is not None
    assert divided.total_seconds < alone.total_seconds


def test_nothing_is_divided_without_workers_or_without_need(
    family: Family, storage: Storage, tmp_path: Path
) -> None:
    for options in ({}, {"workers": 1}):
        plan = plan_wudi(family, storage, tmp_path / "out", **options)
        assert plan.outputs == plan.shards
    for method in ("wudi_cfs", "swudi_a", "task_arithmetic"):
        plan = plan_wudi(family, storage, tmp_path / "out", method, workers=100)
        assert plan.outputs == plan.shards


def test_layers_that_are_not_worth_their_bytes_stay_whole(storage: Storage, tmp_path: Path) -> None:
    document = recipe(make_family(tmp_path / "models", num_experts=3), "wudi", steps=1)
    plan = make_plan(
        parse_recipe(document), storage, MergeOptions(workers=100), str(tmp_path / "out")
    )
    assert plan.outputs == plan.shards


def test_rows_wait_for_their_sums(family: Family, storage: Storage, tmp_path: Path) -> None:
    plan = plan_wudi(family, storage, tmp_path / "out", workers=6)
    needed = shards_needed(plan)
    for shard in plan.shards:
        steps = {plan.settings[problem.setting].step for problem in shard.problems}
        of_needed = {
            plan.settings[plan.shards[index].problems[0].setting].step
            for index in needed[shard.index]
        }
        assert of_needed == (
            {"sums"} if steps == {"rows"} else {"rows"} if "join" in steps else set()
        )


@pytest.mark.parametrize("changed", [0, 1])
def test_a_layer_that_fewer_than_two_experts_changed_is_their_sum(
    storage: Storage, tmp_path: Path, changed: int
) -> None:
    family = make_family(tmp_path / "models", num_experts=3, hidden=192, layers=1)
    for number, state in enumerate(family.expert_states):
        if number >= changed:
            state[DOWN] = family.base_state[DOWN]
            config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
            write_checkpoint(family.experts[number], state, config=config)
    plan = plan_wudi(family, storage, tmp_path / "divided", workers=6)
    assert DOWN in row_blocks(plan)
    run_plan(plan, storage)
    whole = with_row_blocks(plan_wudi(family, storage, tmp_path / "whole"), row_blocks(plan))
    run_plan(whole, storage)
    assert weight_bytes(tmp_path / "divided") == weight_bytes(tmp_path / "whole")
