"""Experts run block by block: what is measured is what hooks on the whole model see."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.errors import CheckpointError, PlanError, RecipeError
from merging.execute.measuring import FEWEST_ROUTED_ROWS
from merging.execute.skeleton import Skeleton
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.plan.statistics_work import StatisticsWork
from merging.receipts import Receipt
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.support.calibrated import (
    ARCHITECTURES,
    SAMPLES,
    VISION,
    calibrated_recipe,
    hooked_inputs,
    run_shards,
    shard_uri,
    statistics_shards,
    write_images,
    write_models,
)
from tests.support.checkpoints import make_family
from tests.support.merges import load_merged, weight_bytes

pytestmark = pytest.mark.slow

NUM_TOKENS = sum(map(len, SAMPLES))


def plan_of(document: dict[str, Any], output: Path, **options: Any) -> Plan:
    return make_plan(parse_recipe(document), open_storage(), MergeOptions(**options), str(output))


def work_of(plan: Plan, shard) -> StatisticsWork:
    setting = plan.settings[shard.problems[0].setting]
    return msgspec.convert(setting.parameters, StatisticsWork)


def normalised(module: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    rows = rows.double()
    if isinstance(module, torch.nn.LayerNorm):
        centred = rows - rows.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
    eps = getattr(module, "variance_epsilon", None) or module.eps
    return rows / (rows.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_statistics_are_those_of_hooks_on_the_whole_model(
    tmp_path: Path, architecture: str
) -> None:
    models = write_models(tmp_path / "models", architecture, 1)
    num_images = 5 if architecture in VISION else 0
    data = write_images(tmp_path / "images.safetensors") if num_images else SAMPLES
    document = calibrated_recipe(models, data=data, samples=5)
    plan = plan_of(document, tmp_path / "out")
    receipts: dict[int, Receipt] = {}
    shards = statistics_shards(plan)
    run_shards(plan, open_storage(), shards, receipts)
    found = {name for s in shards for m in work_of(plan, s).measures for name in m.modules}
    rows = hooked_inputs(models[1], sorted(found), num_images)
    skeleton = Skeleton(work_of(plan, shards[-1]), "cpu")
    kinds = Counter[str]()
    for shard in shards:
        tensors = load_file(shard_uri(plan, shard))
        for measure in work_of(plan, shard).measures:
            statistic = tensors[measure.modules[0]]
            for name in measure.modules:
                X = rows[name].double()
                if ".experts." in name and len(X) < FEWEST_ROUTED_ROWS:
                    assert not statistic.any()
                    kinds["unseen"] += 1
                    continue
                if measure.kind == "norm":
                    expected = normalised(skeleton.find(name), rows[name]).square().sum(0)
                    actual = statistic[:-1].double()
                else:
                    values = statistic[:-1].view(-1, measure.width).double()
                    actual = values if measure.kind == "gram" else values.T @ values
                    expected = X.T @ X
                torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
                assert statistic[-1] == len(X)
            kinds[measure.kind] += 1
    assert kinds["gram"] >= 9
    assert kinds["norm"] >= 6
    assert (kinds["unseen"] > 0) == (architecture in ("mixtral", "qwen2_moe"))
    assert all(receipts[s.index].bytes_read == s.bytes_read for s in shards)


def test_every_linear_layer_and_norm_of_the_blocks_is_measured(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", "llama", 1)
    plan = plan_of(calibrated_recipe(models), tmp_path / "out")
    steps = {
        problem.tensor_name: plan.settings[problem.setting].step
        for shard in plan.outputs
        for problem in shard.problems
    }
    assert [name for name, step in steps.items() if not step] == [
        "model.embed_tokens.weight",
        "lm_head.weight",
    ]
    assert steps["model.norm.weight"] == "norm"
    [measures] = [work_of(plan, s).measures for s in statistics_shards(plan)[1:2]]
    assert [len(measure.modules) for measure in measures if measure.kind == "gram"].count(3) == 1
    assert [len(measure.modules) for measure in measures if measure.kind == "gram"].count(2) == 1


def test_few_rows_are_kept_as_they_are_and_say_the_same(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", "llama", 2)
    few = calibrated_recipe(models, data=[[3, 1, 4, 1, 5], [9, 2, 6]])
    plan = plan_of(few, tmp_path / "rows")
    measures = [m for s in statistics_shards(plan) for m in work_of(plan, s).measures]
    assert {m.kind for m in measures} == {"rows", "norm"}
    run_plan(plan, open_storage())
    few["calibration"]["data"] = [[3, 1, 4, 1, 5], [9, 2, 6]] * 8
    few["calibration"]["samples"] = 16
    many = plan_of(few, tmp_path / "grams")
    kinds = {m.kind for s in statistics_shards(many) for m in work_of(many, s).measures}
    assert kinds == {"gram", "norm"}
    run_plan(many, open_storage())
    merged, other = load_merged(tmp_path / "rows"), load_merged(tmp_path / "grams")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["lot", "fisher"])
def test_a_block_fits_where_the_model_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """4 MiB for a model of 14: what a worker holds of it is one block."""
    held: list[int] = []
    load = Skeleton.load

    def count(skeleton: Skeleton, name: str, tensor: torch.Tensor) -> None:
        load(skeleton, name, tensor)
        storages = {p.untyped_storage().data_ptr(): p for p in skeleton.model.parameters()}
        held.append(sum(p.untyped_storage().nbytes() for p in storages.values()))

    monkeypatch.setattr(Skeleton, "load", count)
    models = make_family(tmp_path, num_experts=1, hidden=128, layers=24, vocab=64)
    paths = [models.base, *models.experts]
    size = sum(e.stat().st_size for e in models.base.glob("*.safetensors"))
    document = calibrated_recipe(paths, method)
    run_plan(plan_of(document, tmp_path / "out", memory_budget=4 << 20), open_storage())
    assert size > 13e6
    assert max(held) < 1e6
    with pytest.raises(PlanError, match=r"needs .* bytes of host memory"):
        plan_of(document, tmp_path / "less", memory_budget=1 << 20)


def test_work_that_stopped_goes_on_at_its_block(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", "qwen3", 2)
    document = calibrated_recipe(models)
    run_plan(plan_of(document, tmp_path / "at-once"), open_storage())
    plan = plan_of(document, tmp_path / "stopped")
    done: list[int] = []

    def engine(work, *args, **kwargs) -> Receipt:
        from merging.execute.shard import run_shard

        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(work.shard.index)
        return run_shard(work, *args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, open_storage(), engine=engine)
    first = list(done)
    done.clear()
    done.extend([-1] * 4)
    run_plan(plan, open_storage(), engine=engine)
    assert not set(first) & set(done[4:])
    assert weight_bytes(tmp_path / "stopped") == weight_bytes(tmp_path / "at-once")


def test_the_order_of_shards_does_not_show(tmp_path: Path) -> None:
    """As of two workers, each with an expert of its own."""
    from merging.publish import prepare_output, publish

    models = write_models(tmp_path / "models", "bert", 2)
    document, storage = calibrated_recipe(models), open_storage()
    run_plan(plan_of(document, tmp_path / "one"), storage)
    plan = plan_of(document, tmp_path / "two")
    prepare_output(plan, storage)
    shards = statistics_shards(plan)
    half = len(shards) // 2
    turns = [shard for pair in zip(shards[half:], shards[:half], strict=True) for shard in pair]
    receipts: dict[int, Receipt] = {}
    run_shards(plan, storage, [*turns, *plan.outputs], receipts)
    publish(plan, list(receipts.values()), storage)
    assert weight_bytes(tmp_path / "two") == weight_bytes(tmp_path / "one")


def test_variants_of_a_sweep_share_the_runs(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", "llama", 2)
    variants = [{"scale": 1.0}, {"scale": 0.5}, {"solver": "pinv", "rtol": 1e-3}]
    document = calibrated_recipe(models)
    swept = {
        **document,
        "sweep": [{"name": f"v{n}", "parameters": own} for n, own in enumerate(variants)],
    }
    plan = plan_of(swept, tmp_path / "swept")
    report = run_plan(plan, open_storage())
    assert report["bytes_read"] == plan.totals.bytes_read
    for number, parameters in enumerate(variants):
        alone = plan_of({**document, "parameters": parameters}, tmp_path / f"alone-{number}")
        assert alone.totals.bytes_read == plan.totals.bytes_read
        assert len(statistics_shards(alone)) == len(statistics_shards(plan))
        run_plan(alone, open_storage())
        assert weight_bytes(tmp_path / "swept" / f"v{number}") == weight_bytes(
            tmp_path / f"alone-{number}"
        )


def write_tokenizer(folder: Path, vocab: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(1, vocab)}
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, **words}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}w9 {{ m['content'] }} w8 {% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", chat_template=template
    ).save_pretrained(folder)


@pytest.mark.parametrize("chat", [False, True])
def test_texts_go_through_the_tokenizer_of_the_expert(tmp_path: Path, chat: bool) -> None:
    models = write_models(tmp_path / "models", "llama", 1)
    write_tokenizer(models[1], 64)
    data = tmp_path / "samples.jsonl"
    around = ([9], [8]) if chat else ([], [])
    ids = [[*around[0], *sample, *around[1]] for sample in SAMPLES]
    lines = [json.dumps({"prompt": " ".join(f"w{i}" for i in sample)}) for sample in SAMPLES]
    data.write_text("\n".join(lines) + "\n\n")
    text = calibrated_recipe(
        models, data=str(data), field="prompt", max_length=16, chat_template=chat
    )
    run_plan(plan_of(text, tmp_path / "text"), open_storage())
    run_plan(plan_of(calibrated_recipe(models, data=ids), tmp_path / "ids"), open_storage())
    merged, expected = load_merged(tmp_path / "text"), load_merged(tmp_path / "ids")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_tokens_of_another_model_are_refused_by_sample(tmp_path: Path) -> None:
    models = write_models(tmp_path / "models", "llama", 1)
    write_tokenizer(models[1], 100)
    document = calibrated_recipe(models, data=["w1 w2", "w3 w99"])
    with pytest.raises(RecipeError, match="Sample 2 has the token id 99"):
        run_plan(plan_of(document, tmp_path / "out"), open_storage())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
            r"no tensor for the parameter 'model\.layers\.0\.self_attn\.k_norm",
        ),
        ({"num_hidden_layers": 2}, r"has no parameter 'model\.layers\.2"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    models = write_models(tmp_path / "models", "llama", 1)
    for model in models:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=words):
        run_plan(plan_of(calibrated_recipe(models), tmp_path / "out"), open_storage())


def test_the_example_recipe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands, in a folder with such models and samples."""
    monkeypatch.chdir(tmp_path)
    paths = write_models(tmp_path / "made", "llama", 2)
    (tmp_path / "models").mkdir()
    (tmp_path / "samples").mkdir()
    for path, name in zip(paths, ("base", "chat", "code"), strict=True):
        write_tokenizer(path, 64)
        path.rename(tmp_path / "models" / name)
    for name in ("chat", "code"):
        lines = [json.dumps({"text": f"w{n} w7 w{n + 9}"}) for n in range(70)]
        (tmp_path / "samples" / f"{name}.jsonl").write_text("\n".join(lines))
    text = (Path(__file__).parents[3] / "examples/recipes/lot.yaml").read_text()
    plan = make_plan(parse_recipe(text), open_storage(), MergeOptions(), str(tmp_path / "out"))
    report = run_plan(plan, open_storage())
    assert [work_of(plan, s).num_samples for s in statistics_shards(plan)] == [64] * 8
    assert report["bytes_read"] == plan.totals.bytes_read
    assert load_merged(tmp_path / "out").keys() == load_merged(tmp_path / "models/base").keys()


@pytest.mark.parametrize("method", ["lot", "regmean", "cat"])
def test_experts_of_mixtures_are_merged_one_by_one(tmp_path: Path, method: str) -> None:
    """What too few tokens reach is merged without samples, and the report names it."""
    models = write_models(tmp_path / "models", "mixtral", 2)
    report = run_plan(plan_of(calibrated_recipe(models, method), tmp_path / "out"), open_storage())
    tensors = {tensor["name"]: tensor for tensor in report["tensors"]}
    mixture = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    assert len(mixture) == 3 * 3 * 3
    rows = {name: tensor["rows"] for name, tensor in mixture.items()}
    assert all(
        n == 0 or FEWEST_ROUTED_ROWS <= n <= NUM_TOKENS for own in rows.values() for n in own
    )
    unseen = {name for name, own in rows.items() if not any(own)}
    some = {name for name, own in rows.items() if any(own) and not all(own)}
    warnings = " ".join(report["warnings"])
    assert ("the others decide" in warnings) == bool(some)
    assert ("merged without samples" in warnings) == bool(unseen)
    assert some | unseen
    if method == "lot":
        assert tensors["model.layers.0.block_sparse_moe.gate.weight"]["rows"] == [NUM_TOKENS] * 2
    merged, base = load_merged(tmp_path / "out"), load_merged(models[0])
    experts = [load_merged(model) for model in models[1:]]
    for name, own in rows.items():
        updates = torch.stack([expert[name] - base[name] for expert in experts])
        plain = base[name] + (updates.sum(0) * 0.4 if method == "cat" else updates.mean(0))
        assert torch.allclose(merged[name], plain, atol=1e-5) == (not any(own))


def fuse_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Mixtral as the model itself has it: the experts of a block in two tensors."""
    fused = {n: t for n, t in tensors.items() if ".experts." not in n}
    for block in range(3):
        experts = f"model.layers.{block}.block_sparse_moe.experts"
        up, down = [], []
        for number in range(3):
            gate_proj, down_proj, up_proj = (
                tensors[f"{experts}.{number}.{part}.weight"] for part in ("w1", "w2", "w3")
            )
            up.append(torch.cat([gate_proj, up_proj]))
            down.append(down_proj)
        fused[f"{experts}.gate_up_proj"] = torch.stack(up)
        fused[f"{experts}.down_proj"] = torch.stack(down)
    return {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in fused.items()}


@pytest.mark.parametrize("method", ["lot", "cat", "regmean"])
def test_experts_in_one_tensor_are_merged_as_those_by_themselves(
    tmp_path: Path, method: str
) -> None:
    models = write_models(tmp_path / "models", "mixtral", 2)
    fused = [tmp_path / "fused" / model.name for model in models]
    for path, model in zip(fused, models, strict=True):
        path.mkdir(parents=True)
        (path / "config.json").write_bytes((model / "config.json").read_bytes())
        save_file(fuse_experts(load_merged(model)), path / "model.safetensors", {"format": "pt"})
    run_plan(plan_of(calibrated_recipe(models, method), tmp_path / "apart"), open_storage())
    plan = plan_of(calibrated_recipe(fused, method), tmp_path / "together")
    report = run_plan(plan, open_storage())
    assert report["bytes_read"] == plan.totals.bytes_read
    expected = fuse_experts(load_merged(tmp_path / "apart"))
    merged = load_merged(tmp_path / "together")
    assert merged.keys() == expected.keys()
    first, second = (load_merged(path) for path in fused[1:])
    for name, tensor in merged.items():
        if method == "lot" or "experts" not in name:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)
        elif method == "regmean":  # which merges matrices
            torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)
    if method != "regmean":
        rows = {t["name"]: t.get("rows") for t in report["tensors"]}
        told = rows["model.layers.0.mlp.experts.down_proj"]
        assert [len(of_models) for of_models in told] == [2, 2, 2]
        assert any(map(any, told))
        assert any("of the mixture: " in text for text in report["warnings"])
