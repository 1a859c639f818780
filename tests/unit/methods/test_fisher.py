"""Fisher merging beside plain gradients of whole models, sample by sample."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from merging.errors import RecipeError
from merging.local_run import run_plan
from merging.method import Task, get_method
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.plan.stages import shards_needed
from merging.publish import prepare_output
from merging.receipts import Receipt
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.calibrated import (
    SAMPLES,
    calibrated_recipe,
    run_shards,
    shard_uri,
    statistics_shards,
    write_models,
)
from tests.support.merges import load_merged, weight_bytes


def weighted(
    tensors: list[torch.Tensor], given: list[torch.Tensor], weights: list[float], **parameters: Any
) -> torch.Tensor:
    method = get_method("fisher")
    task = Task(
        tensor_name="x",
        parameters=method.parameters.model_validate(parameters),
        expert_parameters=[method.expert_parameters(weight=weight) for weight in weights],
        given=given,
    )
    return method.step("fisher").merge(None, iter(tensors), task)


def test_entries_are_weighed_by_what_experts_are_sure_of() -> None:
    W = [torch.tensor([1.0, 2, 3]), torch.tensor([5.0, 6, 7])]
    F = [torch.tensor([1.0, 0, 3]), torch.tensor([30.0, 0, 10])]
    sizes = [torch.tensor([2.0, 4.0]), torch.tensor([20.0, 4.0])]  # root mean squares 1 and 10
    merged = weighted([W[0], F[0], W[1], F[1]], sizes, [1.0, 2.0])
    expected = [(1 * 1 + 6 * 5) / 7, (2 + 2 * 6) / 3, (3 * 3 + 2 * 7) / 5]
    torch.testing.assert_close(merged, torch.tensor(expected))
    merged = weighted([W[0], F[0], W[1], F[1]], sizes, [1.0, 2.0], normalize=False)
    expected = [(1 * 1 + 60 * 5) / 61, (2 + 20 * 6) / 21, (3 * 3 + 20 * 7) / 23]
    torch.testing.assert_close(merged, torch.tensor(expected))


def test_without_any_information_it_is_the_mean() -> None:
    zero, sizes = torch.zeros(2), [torch.tensor([0.0, 4.0])] * 2
    merged = weighted([torch.ones(2), zero, torch.full((2,), 4.0), zero], sizes, [1.0, 2.0])
    torch.testing.assert_close(merged, torch.full((2,), 3.0))


def plan_of(models: list[Path], output: Path, **calibration: Any) -> Plan:
    document = calibrated_recipe(models, "fisher", **calibration)
    return make_plan(parse_recipe(document), open_storage(), MergeOptions(seed=7), str(output))


def plain_diagonals(folder: Path, labels: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """By autograd through the whole model, in float64; by the names of its checkpoint."""
    config = transformers.AutoConfig.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    )
    [architecture] = config.architectures
    model = getattr(transformers, architecture).from_pretrained(folder, config=config)
    model = model.eval().double()
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for sample, own in zip(SAMPLES, labels, strict=True):
        model.zero_grad()
        logits = model(input_ids=torch.tensor([sample])).logits[0].double()
        places = (own[: len(sample)] >= 0).nonzero()[:, 0]
        logits.log_softmax(-1)[places, own.long()[places]].sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[name] += parameter.grad.square() / len(SAMPLES)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found[name])
    model.save_pretrained(folder / "diagonals")
    return load_file(folder / "diagonals" / "model.safetensors")


def run_statistics(plan: Plan) -> tuple[list[dict[str, torch.Tensor]], dict[int, Receipt]]:
    """What the shards of each expert left, by name."""
    receipts: dict[int, Receipt] = {}
    shards = statistics_shards(plan)
    run_shards(plan, open_storage(), shards, receipts)
    left: dict[str, dict[str, torch.Tensor]] = {}
    for shard in shards:
        stage, number, _ = shard.file_name.split("-")
        if stage == "fisher":
            left.setdefault(number, {}).update(load_file(shard_uri(plan, shard)))
    assert all(receipts[s.index].bytes_read == s.bytes_read for s in shards)
    return list(left.values()), receipts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "labels"),
    [(name, "sampled") for name in ("llama", "gemma3", "gpt2", "qwen3", "mixtral", "qwen2_moe")]
    + [("llama", "given"), ("gpt2", "given")],
)
def test_diagonals_are_those_of_gradients_of_the_whole_model(
    tmp_path: Path, architecture: str, labels: str
) -> None:
    """Gemma and GPT-2 have one matrix at both ends."""
    models = write_models(tmp_path / "models", architecture, 1)
    [left], _ = run_statistics(plan_of(models, tmp_path / "out", labels=labels))
    if labels == "given":
        for own, sample in zip(left["labels"], SAMPLES, strict=True):
            assert own.tolist() == [
                *sample[1:],
                *[-1] * (1 + left["labels"].shape[1] - len(sample)),
            ]
    else:
        assert [(own >= 0).sum() for own in left["labels"]] == [len(sample) for sample in SAMPLES]
    expected = plain_diagonals(models[1], list(left["labels"]))
    assert expected.keys() <= left.keys()
    squares = 0.0
    for name, diagonal in expected.items():
        assert diagonal.max() > 0 or ".experts." in name
        scale = float(diagonal.max())
        torch.testing.assert_close(left[name].double(), diagonal, rtol=1e-3, atol=1e-5 * scale)
        squares += float(diagonal.square().sum())
    entries = sum(diagonal.numel() for diagonal in expected.values())
    torch.testing.assert_close(
        left["fisher.size"].double(),
        torch.tensor([squares**0.5, entries]).double(),
        rtol=1e-3,
        atol=0,
    )


@pytest.mark.slow
def test_labels_are_drawn_from_the_model_s_predictions(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", "llama", 1)
    sample = [3, 1, 4, 1, 5]
    [left], _ = run_statistics(plan_of(models, tmp_path / "out", data=[sample] * 400, samples=400))
    model = transformers.AutoModelForCausalLM.from_pretrained(models[1]).eval()
    with torch.no_grad():
        likely = model(input_ids=torch.tensor([sample])).logits[0].softmax(-1)
    drawn = left["labels"].long()
    for place in range(5):
        counts = torch.bincount(drawn[:, place], minlength=64) / 400
        assert float((counts - likely[place]).abs().max()) < 0.1
        assert len(set(drawn[:, place].tolist())) > 1


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_whole_model_is_merged_by_the_formula(tmp_path: Path, architecture: str) -> None:
    models = write_models(tmp_path / "models", architecture, 2)
    plan = plan_of(models, tmp_path / "merged")
    diagonals, _ = run_statistics(plan)
    run_plan(plan, open_storage())
    merged = load_merged(tmp_path / "merged")
    experts = [load_file(path / "model.safetensors") for path in models[1:]]
    rms = [own["fisher.size"][0] / own["fisher.size"][1].sqrt() for own in diagonals]
    assert merged.keys() == experts[0].keys()
    for name, tensor in merged.items():
        F = [(own[name] / r).clamp(min=1e-6) for own, r in zip(diagonals, rms, strict=True)]
        expected = sum(f * e[name] for f, e in zip(F, experts, strict=True)) / sum(F)
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_neither_the_order_of_shards_nor_a_stop_shows(tmp_path: Path) -> None:
    models, storage = write_models(tmp_path / "models", "gemma3", 2), open_storage()
    run_plan(plan_of(models, tmp_path / "one"), storage)
    plan = plan_of(models, tmp_path / "other")
    prepare_output(plan, storage)
    needed = shards_needed(plan)
    receipts: dict[int, Receipt] = {}
    chance = random.Random(5)
    while len(receipts) < len(plan.shards) - 6:
        ready = [
            s for s in plan.shards if s.index not in receipts and needed[s.index] <= set(receipts)
        ]
        run_shards(plan, storage, [chance.choice(ready)], receipts)
    done: list[int] = []

    def engine(work, *args, **kwargs) -> Receipt:
        from merging.execute.shard import run_shard

        done.append(work.shard.index)
        return run_shard(work, *args, **kwargs)

    run_plan(plan, storage, engine=engine)
    assert not set(done) & set(receipts)
    assert weight_bytes(tmp_path / "other") == weight_bytes(tmp_path / "one")


@pytest.mark.slow
def test_diagonals_that_are_kept_serve_other_merges(tmp_path: Path) -> None:
    models, storage = write_models(tmp_path / "models", "gpt2", 2), open_storage()
    document = calibrated_recipe(models, "fisher")
    options = MergeOptions(statistics_uri=str(tmp_path / "kept"))
    plan = make_plan(parse_recipe(document), storage, options, str(tmp_path / "first"))
    run_plan(plan, storage)
    document["parameters"] = {"normalize": False}
    plan = make_plan(parse_recipe(document), storage, options, str(tmp_path / "second"))
    receipts: dict[int, Receipt] = {}
    run_shards(plan, storage, statistics_shards(plan), receipts)
    assert all(receipt.reused for receipt in receipts.values())
    fewer = {**document, "parameters": {"touch": [r"h\.0"]}}
    given = {**document, "calibration": document["calibration"] | {"labels": "given"}}
    for other in (fewer, given):
        plan = make_plan(parse_recipe(other), storage, options, str(tmp_path / "third"))
        back = [
            s
            for s in statistics_shards(plan)
            if "fisher.size" in {p.tensor_name for p in s.problems}
        ]
        assert not any(Path(shard_uri(plan, shard)).exists() for shard in back)


@pytest.mark.slow
def test_variants_of_a_sweep_share_the_diagonals(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", "llama", 2)
    document = calibrated_recipe(models, "fisher")
    document["sweep"] = [{"name": str(n), "parameters": {"normalize": bool(n)}} for n in (0, 1)]
    options = MergeOptions(seed=7)
    plan = make_plan(parse_recipe(document), open_storage(), options, str(tmp_path / "out"))
    run_plan(plan, open_storage())
    run_plan(plan_of(models, tmp_path / "alone"), open_storage())
    alone, swept = load_merged(tmp_path / "alone"), load_merged(tmp_path / "out" / "1")
    other = load_merged(tmp_path / "out" / "0")
    assert len(statistics_shards(plan)) == 2 * (4 + 5)
    assert any(not torch.equal(other[name], tensor) for name, tensor in swept.items())
    assert all(torch.equal(alone[name], tensor) for name, tensor in swept.items())


@pytest.mark.slow
def test_only_parts_above_the_lowest_chosen_tensor_are_gone_back_through(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", "llama", 1)
    document = calibrated_recipe(models, "fisher")
    document["parameters"] = {"touch": [r"layers\.1\.mlp"], "rest": "mean"}
    plan = make_plan(parse_recipe(document), open_storage(), MergeOptions(), str(tmp_path / "out"))
    names = [s.file_name for s in statistics_shards(plan) if s.file_name.startswith("fisher")]
    assert [name.split("-")[2][:5] for name in names] == ["00004", "00003", "00002"]
    run_plan(plan, open_storage())


@pytest.mark.slow
def test_a_model_that_predicts_no_tokens_is_refused(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", "bert", 1)
    with pytest.raises(RecipeError, match="is a BertModel, which predicts no next tokens"):
        plan_of(models, tmp_path / "out")
