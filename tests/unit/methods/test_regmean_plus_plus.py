"""RegMean++ beside its procedure on whole models: merge a block, run it, merge the next one."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from merging.errors import RecipeError
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.plan.stages import shards_needed
from merging.publish import prepare_output, publish
from merging.receipts import Receipt
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.calibrated import (
    calibrated_recipe,
    hooked_inputs,
    run_shards,
    statistics_shards,
    write_models,
)
from tests.support.merges import load_merged, weight_bytes

pytestmark = pytest.mark.slow

METHOD = "regmean_plus_plus"


def plan_of(models: list[Path], output: Path, parameters: dict[str, Any] | None = None) -> Plan:
    document = calibrated_recipe(models, METHOD)
    if parameters:
        document["parameters"] = parameters
    return make_plan(parse_recipe(document), open_storage(), MergeOptions(), str(output))


def layer_of(name: str) -> int:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else -1


def merge_in_turn(
    paths: list[Path], linear: list[str], alpha: float, scratch: Path
) -> dict[str, torch.Tensor]:
    """What a plain program makes: the experts' mean in which one block after another is solved."""
    experts = [load_file(path / "model.safetensors") for path in paths]
    merged = {name: sum(e[name] for e in experts) / len(experts) for name in experts[0]}
    config = transformers.AutoConfig.from_pretrained(paths[0])
    config.save_pretrained(scratch)
    for block in range(config.num_hidden_layers):
        names = [name for name in linear if layer_of(name) == block]
        rows = []
        for expert in experts:
            own = {n: expert[n] if layer_of(n) == block else merged[n] for n in merged}
            save_file(own, scratch / "model.safetensors", {"format": "pt"})
            rows.append(hooked_inputs(scratch, [n.removesuffix(".weight") for n in names]))
        for name in names:
            flip = (lambda t: t.T) if "c_" in name else (lambda t: t)
            X = [one[name.removesuffix(".weight")].double().numpy() for one in rows]
            H = [x.T @ x / len(x) for x in X]
            H = [alpha * h + (1 - alpha) * np.diag(np.diag(h)) for h in H]
            W = [flip(expert[name].double().numpy()) for expert in experts]
            solved = sum(w @ h for w, h in zip(W, H, strict=True)) @ np.linalg.inv(sum(H))
            merged[name] = torch.from_numpy(flip(solved).copy()).float()
    return merged


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_a_whole_model_is_merged_block_after_block(tmp_path: Path, architecture: str) -> None:
    paths = write_models(tmp_path / "models", architecture, 2)[1:]
    plan = plan_of([tmp_path, *paths], tmp_path / "merged", {"alpha": 0.8})
    run_plan(plan, open_storage())
    merged = load_merged(tmp_path / "merged")
    steps = {
        problem.tensor_name: plan.settings[problem.setting].step
        for shard in plan.outputs
        for problem in shard.problems
    }
    linear = [name for name, step in steps.items() if step and layer_of(name) >= 0]
    expected = merge_in_turn(paths, linear, 0.8, tmp_path / "scratch")
    assert len(linear) == 3 * {"llama": 7, "gpt2": 4, "bert": 6}[architecture]
    for name in set(merged) - {"pooler.dense.weight"}:  # which sees the expert's last block
        torch.testing.assert_close(merged[name], expected[name], rtol=2e-3, atol=2e-4)
    assert plan.totals.tensors == len(merged)


def test_the_order_of_shards_does_not_show(tmp_path: Path) -> None:
    """As of several workers: any shard whose files are there may be next."""
    models, storage = write_models(tmp_path / "models", "qwen3", 3), open_storage()
    run_plan(plan_of(models, tmp_path / "one"), storage)
    plan = plan_of(models, tmp_path / "other")
    prepare_output(plan, storage)
    needed = shards_needed(plan)
    receipts: dict[int, Receipt] = {}
    chance = random.Random(5)
    while len(receipts) < len(plan.shards):
        ready = [
            s for s in plan.shards if s.index not in receipts and needed[s.index] <= set(receipts)
        ]
        run_shards(plan, storage, [chance.choice(ready)], receipts)
    publish(plan, list(receipts.values()), storage)
    assert weight_bytes(tmp_path / "other") == weight_bytes(tmp_path / "one")
    assert all(receipts[s.index].bytes_read == s.bytes_read for s in plan.shards)


@pytest.mark.parametrize("num_done", [5, 9])
def test_work_that_stopped_goes_on_where_it_was(tmp_path: Path, num_done: int) -> None:
    models = write_models(tmp_path / "models", "llama", 2)
    run_plan(plan_of(models, tmp_path / "at-once"), open_storage())
    plan, done = plan_of(models, tmp_path / "stopped"), []

    def engine(work, *args, **kwargs) -> Receipt:
        from merging.execute.shard import run_shard

        if len(done) == num_done:
            raise KeyboardInterrupt
        done.append(work.shard.index)
        return run_shard(work, *args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, open_storage(), engine=engine)
    first = list(done)
    done.append(-1)
    run_plan(plan, open_storage(), engine=engine)
    assert not set(first) & set(done[num_done + 1 :])
    assert weight_bytes(tmp_path / "stopped") == weight_bytes(tmp_path / "at-once")


def test_experts_are_side_by_side_and_blocks_one_after_another(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", "llama", 3)
    plan = plan_of(models, tmp_path / "out")
    needed, levels = shards_needed(plan), list[int]()
    for shard in plan.shards:
        levels.append(1 + max((levels[index] for index in needed[shard.index]), default=0))
    assert max(levels) == 2 + 3 * 3 - 1  # embedding and its run; then run, solve, carry on
    assert [levels.count(level) for level in range(1, 11)] == [1, 3, 3, 1, 3, 3, 1, 3, 3, 1]
    assert len(statistics_shards(plan)) == 3 * (3 + 3)
    names = [shard.file_name for shard in plan.outputs]
    assert names == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]


def test_a_block_shards_like_anything_else(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", "llama", 2)
    document = calibrated_recipe(models, METHOD)
    options = MergeOptions(max_shard_size=5000)
    plan = make_plan(parse_recipe(document), open_storage(), options, str(tmp_path / "out"))
    assert len(plan.outputs) > 8
    assert max(shard.size for shard in plan.outputs) <= 5000


def test_variants_of_a_sweep_are_refused(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", "llama", 2)
    document = calibrated_recipe(models, METHOD)
    document["sweep"] = [{"name": str(n), "parameters": {"alpha": n / 10}} for n in (8, 9)]
    with pytest.raises(RecipeError, match="which variants cannot share"):
        make_plan(parse_recipe(document), open_storage(), MergeOptions(), str(tmp_path / "out"))
