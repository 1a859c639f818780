from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from merging.checkpoint.header import parse_header
from merging.errors import CheckpointError, MergeError, PlanError, RecipeError, StorageError
from merging.options import MergeOptions
from merging.plan.packing import shard_header
from merging.plan.plan import WORKSPACE, Plan, Problem, Setting
from merging.plan.planner import make_plan
from merging.plan.summary import plan_summary
from merging.recipe import parse_recipe
from tests.support.header_checkpoints import LLAMA_CONFIG, llama_tensors, put_checkpoint
from tests.support.memory_storage import MemoryStorage

OUTPUT = "mem://out/merged"
BASE, MATH, CODE = "mem://models/base", "mem://models/math", "mem://models/code"

LINEAR = {"merge_method": "linear", "models": [{"model": MATH}, {"model": CODE}]}
TASK_ARITHMETIC = {
    "merge_method": "task_arithmetic",
    "base_model": BASE,
    "models": [{"model": MATH, "parameters": {"weight": 0.5}}, {"model": CODE}],
}


@pytest.fixture
def storage() -> MemoryStorage:
    """A base model and two experts, alike in everything but their versions."""
    memory = MemoryStorage()
    for uri in (BASE, MATH, CODE):
        put_checkpoint(
            memory, uri, llama_tensors(), num_files=2, companions=("tokenizer.json", "notes.txt")
        )
    return memory


def plan(
    storage: MemoryStorage, recipe: dict[str, Any], output: str = OUTPUT, **options: Any
) -> Plan:
    return make_plan(parse_recipe(recipe), storage, MergeOptions(**options), output)


def problems(found: Plan) -> dict[str, Problem]:
    return {p.tensor_name: p for shard in found.shards for p in shard.problems}


def settings(found: Plan) -> dict[str, Setting]:
    return {name: found.settings[p.setting] for name, p in problems(found).items()}


def refusal(storage: MemoryStorage, recipe: dict[str, Any], **options: Any) -> MergeError:
    with pytest.raises(MergeError) as caught:
        plan(storage, recipe, **options)
    return caught.value


def faults(error: MergeError) -> list[tuple[str, str]]:
    return [(fault.pointer, fault.code) for fault in error.faults]


# What a plan says


def test_plan_names_sources_with_their_versions_and_reads_each_byte_once(
    storage: MemoryStorage,
) -> None:
    found = plan(storage, TASK_ARITHMETIC)
    assert {file.uri: file.version for file in found.files} == {
        item.uri: item.version
        for uri in (BASE, MATH, CODE)
        for item in storage.list(uri)
        if item.uri.endswith(".safetensors")
    }
    weights = sum(p.num_entries * 2 for p in problems(found).values())
    assert found.totals.bytes_read == 3 * weights
    for p in problems(found).values():
        assert p.base is not None
        sources = [found.files[s.file].uri.rpartition("/")[0] for s in (p.base, *p.experts)]
        assert sources == [BASE, MATH, CODE]
        assert {s.num_bytes for s in (p.base, *p.experts)} == {p.num_entries * 2}
    assert [(i.uri, i.role) for i in found.inputs] == [
        (BASE, "base"), (MATH, "expert"), (CODE, "expert"),
    ]  # fmt: skip
    assert len({i.digest for i in found.inputs}) == 3


def test_planning_reads_no_weights(storage: MemoryStorage) -> None:
    for uri in (BASE, MATH, CODE):
        put_checkpoint(storage, uri, llama_tensors(hidden=1024), num_files=2)
    storage.bytes_read = 0
    found = plan(storage, TASK_ARITHMETIC)
    assert storage.bytes_read < 1 << 20 < found.totals.bytes_read


def test_sizes_of_output_files_are_exact(storage: MemoryStorage) -> None:
    found = plan(storage, TASK_ARITHMETIC, max_shard_size=30_000)
    assert len(found.shards) > 3
    for shard in found.shards:
        raw = shard_header(shard.problems)
        header = parse_header(raw[8:], len(raw), shard.size, shard.file_name)
        assert [(e.name, e.dtype, e.shape) for e in header.entries] == [
            (p.tensor_name, p.dtype, p.shape) for p in shard.problems
        ]
    assert found.totals.bytes_written == sum(shard.size for shard in found.shards)


def test_tensors_stand_in_the_model_order(storage: MemoryStorage) -> None:
    for uri in (BASE, MATH, CODE):
        put_checkpoint(storage, uri, llama_tensors(layers=12))
    names = list(problems(plan(storage, TASK_ARITHMETIC)))
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["lm_head.weight", "model.norm.weight"]
    layers = [int(name.split(".")[2]) for name in names[1:-2]]
    assert layers == sorted(layers)


def test_plan_survives_json(storage: MemoryStorage) -> None:
    found = plan(storage, TASK_ARITHMETIC, max_shard_size=30_000)
    assert Plan.from_json(found.to_json()) == found
    assert Plan.from_json(found.to_json()).digest == found.digest


def test_work_of_a_shard_refers_to_the_same_sources_and_settings(storage: MemoryStorage) -> None:
    recipe = {**TASK_ARITHMETIC, "parameters": {"lambda": [{"filter": "mlp", "value": 2}]}}
    found = plan(storage, recipe, max_shard_size=30_000)
    for shard in found.shards:
        work = found.work(shard.index, found.digest)
        assert len(work.files) <= 6
        assert work.plan_digest == found.digest
        for planned, sent in zip(shard.problems, work.shard.problems, strict=True):
            assert work.settings[sent.setting] == found.settings[planned.setting]
            assert planned.base is not None
            assert sent.base is not None
            for a, b in zip(
                (planned.base, *planned.experts), (sent.base, *sent.experts), strict=True
            ):
                assert found.files[a.file] == work.files[b.file]
                assert (a.start, a.end, a.dtype) == (b.start, b.end, b.dtype)


def test_same_recipe_gives_the_same_plan_whatever_its_key_order(storage: MemoryStorage) -> None:
    backwards = dict(reversed(TASK_ARITHMETIC.items()))
    digests = {plan(storage, recipe).digest for recipe in (TASK_ARITHMETIC, backwards)}
    assert len(digests) == 1


def test_seed_threads_and_budget_are_part_of_the_plan(storage: MemoryStorage) -> None:
    found = plan(storage, LINEAR, seed=7, threads=3, memory_budget="1GiB", check_finite=False)
    assert (found.seed, found.threads, found.memory_budget) == (7, 3, 1 << 30)
    assert not found.check_finite


_IN_A_PROCESS = """
import sys
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from tests.support.header_checkpoints import llama_tensors, put_checkpoint
from tests.support.memory_storage import MemoryStorage

storage = MemoryStorage()
for name in ("base", "math", "code"):
    put_checkpoint(storage, f"mem://models/{name}", llama_tensors(), num_files=2)
recipe = parse_recipe(
    "{merge_method: wudi, base_model: 'mem://models/base', models: "
    "[{model: 'mem://models/math'}, {model: 'mem://models/code'}]}"
)
print(make_plan(recipe, storage, MergeOptions(), "mem://out/merged").digest)
assert "torch" not in sys.modules, "planning imported torch"
"""


def test_plan_is_the_same_in_every_process_and_needs_no_torch() -> None:
    digests = set()
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", _IN_A_PROCESS],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout.strip())
    assert len(digests) == 1


def test_summary_tells_files_methods_and_totals(storage: MemoryStorage) -> None:
    found = plan(storage, {**TASK_ARITHMETIC, "merge_method": "wudi", "models": [{"model": MATH}]})
    summary = plan_summary(found)
    assert summary["plan_digest"] == found.digest
    assert summary["tensors_by_method"] == {"linear": 5, "wudi": 6}
    assert [(f["name"], f["size"]) for f in summary["files"]] == [
        (shard.file_name, shard.size) for shard in found.shards
    ]
    assert summary["bytes_read"] == sum(f["bytes_read"] for f in summary["files"])
    assert summary["flops"] == pytest.approx(sum(f["flops"] for f in summary["files"]))
    assert summary["companions"] == ["tokenizer.json"]


# Which method and parameters a tensor gets


def test_parameters_are_resolved_with_defaults(storage: MemoryStorage) -> None:
    [setting] = plan(storage, TASK_ARITHMETIC).settings
    assert setting.method == "task_arithmetic"
    assert setting.parameters["lambda"] == 1.0
    assert [e["weight"] for e in setting.expert_parameters] == [0.5, 1.0]
    assert not {"touch", "rest"} & setting.parameters.keys()


def test_value_of_a_model_goes_before_the_value_for_all(storage: MemoryStorage) -> None:
    models = [
        {"model": MATH, "parameters": {"weight": {"filter": "mlp", "value": 3}}},
        {"model": CODE},
    ]
    found = settings(plan(storage, {**LINEAR, "models": models, "parameters": {"weight": 2}}))
    mlp, attention = (
        found[f"model.layers.0.{part}.weight"] for part in ("mlp.up_proj", "self_attn.q_proj")
    )
    assert [e["weight"] for e in mlp.expert_parameters] == [3.0, 2.0]
    assert [e["weight"] for e in attention.expert_parameters] == [2.0, 2.0]


def test_gradient_runs_over_the_layers_of_the_model(storage: MemoryStorage) -> None:
    for uri in (MATH, CODE):
        put_checkpoint(storage, uri, llama_tensors(layers=3))
    found = settings(plan(storage, {**LINEAR, "parameters": {"weight": [0.25, 0.75]}}))
    weights = {name: s.expert_parameters[0]["weight"] for name, s in found.items()}
    for layer, expected in enumerate((0.25, 0.5, 0.75)):
        assert weights[f"model.layers.{layer}.mlp.up_proj.weight"] == expected
    assert weights["model.embed_tokens.weight"] == weights["lm_head.weight"] == 0.25


def test_towers_have_layers_of_their_own(storage: MemoryStorage) -> None:
    towers = {
        f"{tower}.layers.{layer}.mlp.up_proj.weight": ("F32", (8, 8))
        for tower, count in (("vision", 2), ("text", 5))
        for layer in range(count)
    }
    for uri in (MATH, CODE):
        put_checkpoint(storage, uri, towers)
    found = settings(plan(storage, {**LINEAR, "parameters": {"weight": [0, 1]}}))
    weights = [s.expert_parameters[0]["weight"] for s in found.values()]
    assert weights == [0, 1, 0, 0.25, 0.5, 0.75, 1]


def test_filter_that_matches_nothing_is_warned_of(storage: MemoryStorage) -> None:
    recipe = {**LINEAR, "parameters": {"weight": [{"filter": "self_atn", "value": 2}]}}
    assert "The filter 'self_atn' is part of no tensor's name" in plan(storage, recipe).warnings[0]


WUDI = {**TASK_ARITHMETIC, "merge_method": "wudi", "models": [{"model": MATH}, {"model": CODE}]}


@pytest.mark.parametrize(("rest", "method"), [("mean", "linear"), ("base", "copy")])
def test_tensors_that_a_method_does_not_touch_become_base_or_mean(
    storage: MemoryStorage, rest: str, method: str
) -> None:
    found = plan(storage, {**WUDI, "parameters": {"rest": rest}})
    by_name = settings(found)
    assert by_name["model.layers.0.mlp.up_proj.weight"].method == "wudi"
    norm = problems(found)["model.norm.weight"]
    assert found.settings[norm.setting].method == method
    sources = (norm.base, *norm.experts) if norm.base else norm.experts
    folders = [found.files[source.file].uri.rpartition("/")[0] for source in sources]
    assert folders == ([MATH, CODE] if rest == "mean" else [BASE])


def test_touch_chooses_tensors_by_regular_expression(storage: MemoryStorage) -> None:
    recipe = {**TASK_ARITHMETIC, "parameters": {"touch": [r"mlp\.(up|down)"], "rest": "base"}}
    methods = {name: s.method for name, s in settings(plan(storage, recipe)).items()}
    assert {n for n, m in methods.items() if m == "task_arithmetic"} == {
        n for n in methods if "mlp" in n
    }


def test_touch_that_chooses_nothing_is_refused(storage: MemoryStorage) -> None:
    error = refusal(storage, {**TASK_ARITHMETIC, "parameters": {"touch": ["nothing"]}})
    assert isinstance(error, PlanError)
    assert error.code == "nothing_to_do"
    assert "Choose other tensors with the parameter 'touch'" in error.detail


def test_rest_from_a_base_that_is_not_named_is_refused(storage: MemoryStorage) -> None:
    error = refusal(storage, {**LINEAR, "parameters": {"touch": "linear", "rest": "base"}})
    assert faults(error) == [("/parameters/rest", "incompatible_options")]


def test_base_among_the_models_is_no_expert(storage: MemoryStorage) -> None:
    models = [{"model": f"{BASE}/"}, {"model": MATH}]
    found = plan(storage, {**TASK_ARITHMETIC, "models": models})
    assert [(i.uri, i.role) for i in found.inputs] == [(BASE, "base"), (MATH, "expert")]
    assert {len(p.experts) for p in problems(found).values()} == {1}


def test_base_under_another_spelling_is_no_expert_either() -> None:
    class Aliases(MemoryStorage):
        def normalise(self, uri: str) -> str:
            return super().normalise(BASE if uri == "mem://alias" else uri)

    recipe = parse_recipe({**TASK_ARITHMETIC, "models": [{"model": "mem://alias"}]})
    with pytest.raises(RecipeError, match="at least 1 models besides the base model") as caught:
        make_plan(recipe, Aliases(), MergeOptions(), OUTPUT)
    assert faults(caught.value) == [("/models", "incompatible_options")]


def test_same_expert_may_be_named_twice(storage: MemoryStorage) -> None:
    found = plan(storage, {**LINEAR, "models": [{"model": MATH}, {"model": MATH}]})
    assert {len(p.experts) for p in problems(found).values()} == {2}
    assert len(found.files) == 2


def test_method_without_base_reads_it_only_as_a_model(storage: MemoryStorage) -> None:
    models = [{"model": MATH}, {"model": CODE}]
    found = plan(storage, {**LINEAR, "models": models, "base_model": CODE})
    assert all(p.base is None and len(p.experts) == 2 for p in problems(found).values())
    assert found.companions[0].source_uri == f"{CODE}/tokenizer.json"


def test_conv1d_tensors_are_marked_transposed(storage: MemoryStorage) -> None:
    gpt2 = {"h.0.mlp.c_fc.weight": ("F32", (64, 256)), "h.0.ln_1.weight": ("F32", (64,))}
    for uri in (BASE, MATH, CODE):
        put_checkpoint(storage, uri, gpt2, config={"model_type": "gpt2"})
    found = problems(plan(storage, WUDI))
    assert found["h.0.mlp.c_fc.weight"].transposed
    assert not found["h.0.ln_1.weight"].transposed


# Types, config, companions


@pytest.mark.parametrize(
    ("base", "math", "given", "expected"),
    [
        ("BF16", "BF16", {}, "BF16"),
        ("BF16", "F32", {}, "F32"),
        ("F16", "BF16", {}, "F32"),
        ("F64", "BF16", {}, "F64"),
        ("F8_E4M3", "F8_E4M3", {}, "BF16"),
        ("F8_E4M3", "F16", {}, "F32"),
        ("F32", "F32", {"dtype": "float16"}, "F16"),
        ("F32", "F32", {"dtype": "float32", "out_dtype": "bfloat16"}, "BF16"),
    ],
)
def test_type_of_merged_tensors(
    storage: MemoryStorage, base: str, math: str, given: dict[str, str], expected: str
) -> None:
    put_checkpoint(storage, BASE, llama_tensors(dtype=base))
    put_checkpoint(storage, MATH, llama_tensors(dtype=math))
    recipe = {**TASK_ARITHMETIC, "models": [{"model": MATH}], **given}
    found = plan(storage, recipe)
    assert {p.dtype for p in problems(found).values()} == {expected}
    assert any("different types" in w for w in found.warnings) == (base != math)


def test_copied_tensors_take_the_asked_type_too(storage: MemoryStorage) -> None:
    found = plan(storage, {**WUDI, "parameters": {"rest": "base"}, "dtype": "float32"})
    assert {p.dtype for p in problems(found).values()} == {"F32"}


def test_integer_tensors_are_copied_as_they_are(storage: MemoryStorage) -> None:
    for uri, length in ((BASE, 8), (MATH, 9)):
        ids = {"model.position_ids": ("I64", (1, length))}
        put_checkpoint(storage, uri, llama_tensors() | ids)
    put_checkpoint(storage, CODE, llama_tensors())
    found = plan(storage, {**TASK_ARITHMETIC, "dtype": "float32"})
    ids = problems(found)["model.position_ids"]
    assert (ids.dtype, ids.shape, ids.experts) == ("I64", (1, 8), ())
    assert ids.base is not None
    assert found.files[ids.base.file].uri.startswith(BASE)
    assert found.settings[ids.setting].method == "copy"


def test_integer_tensors_of_an_expert_alone_are_left_out_with_a_warning(
    storage: MemoryStorage,
) -> None:
    put_checkpoint(storage, MATH, llama_tensors() | {"mask": ("BOOL", (4,))})
    found = plan(storage, TASK_ARITHMETIC)
    assert "mask" not in problems(found)
    assert "1 integer tensors" in found.warnings[0]


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_config_states_the_type_of_the_weights_under_the_key_it_has(
    storage: MemoryStorage, key: str
) -> None:
    config = {"model_type": "x", key: "bfloat16", "text_config": {key: "bfloat16", "n": 1}}
    put_checkpoint(storage, BASE, llama_tensors(), config=config)
    found = plan(storage, {**TASK_ARITHMETIC, "dtype": "float16"})
    assert found.config == {
        "model_type": "x", key: "float16", "text_config": {key: "float16", "n": 1},
    }  # fmt: skip


def test_config_without_a_type_gets_none(storage: MemoryStorage) -> None:
    put_checkpoint(storage, BASE, llama_tensors(), config={"model_type": "x"})
    assert plan(storage, TASK_ARITHMETIC).config == {"model_type": "x"}


def test_tokenizer_files_come_from_the_base_or_the_first_expert(storage: MemoryStorage) -> None:
    for recipe, donor in ((TASK_ARITHMETIC, BASE), (LINEAR, MATH)):
        [companion] = plan(storage, recipe).companions
        assert companion.source_uri == f"{donor}/tokenizer.json"
        assert companion.version == storage.stat(companion.source_uri).version


def test_differing_architectures_are_warned_of(storage: MemoryStorage) -> None:
    put_checkpoint(storage, MATH, llama_tensors(), config={**LLAMA_CONFIG, "model_type": "qwen2"})
    assert "model_type 'qwen2'" in plan(storage, TASK_ARITHMETIC).warnings[0]


# Tied heads


def without_head() -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: t for name, t in llama_tensors().items() if name != "lm_head.weight"}


@pytest.mark.parametrize("tied_config", [{"tie_word_embeddings": True}, {}])
@pytest.mark.parametrize("tied_uri", [BASE, MATH])
def test_head_that_some_models_tie_is_dropped_with_a_warning(
    storage: MemoryStorage, tied_uri: str, tied_config: dict[str, Any]
) -> None:
    for uri in (BASE, MATH, CODE):
        tensors = without_head() if uri == tied_uri else llama_tensors()
        put_checkpoint(storage, uri, tensors, config=tied_config)
        storage.delete(f"{uri}/model.safetensors.index.json")
        for number in (1, 2):
            storage.delete(f"{uri}/model-{number:05d}-of-00002.safetensors")
    found = plan(storage, TASK_ARITHMETIC)
    assert "lm_head.weight" not in problems(found)
    assert f"lm_head.weight is left out: {tied_uri} tie it" in found.warnings[0]


def test_head_that_is_missing_although_models_do_not_tie_it_is_refused(
    storage: MemoryStorage,
) -> None:
    put_checkpoint(storage, MATH, without_head())
    for number in (1, 2):
        storage.delete(f"{MATH}/model-{number:05d}-of-00002.safetensors")
    error = refusal(storage, TASK_ARITHMETIC)
    assert faults(error) == [("/models/0/model", "missing_tensor")]


# Models that do not fit together


def replace_checkpoint(storage: MemoryStorage, uri: str, tensors: Any, **options: Any) -> None:
    for item in storage.list(uri):
        storage.delete(item.uri)
    put_checkpoint(storage, uri, tensors, **options)


def test_missing_extra_and_misshapen_tensors_of_every_expert_are_reported_at_once(
    storage: MemoryStorage,
) -> None:
    lacking = dict(llama_tensors())
    del lacking["model.norm.weight"]
    lacking["adapter.weight"] = ("BF16", (3, 3))
    replace_checkpoint(storage, MATH, lacking)
    replace_checkpoint(storage, CODE, llama_tensors(vocab=130))
    error = refusal(storage, TASK_ARITHMETIC)
    assert isinstance(error, CheckpointError)
    assert faults(error) == [
        ("/models/0/model", "missing_tensor"),
        ("/models/0/model", "extra_tensor"),
        ("/models/1/model", "shape_mismatch"),
    ]
    details = [fault.detail for fault in error.faults]
    assert details[0] == f"{MATH} lacks 1 tensor that {BASE} has: model.norm.weight."
    assert details[1] == f"{MATH} has 1 tensor that {BASE} does not have: adapter.weight."
    assert "lm_head.weight [130, 64] instead of [128, 64]" in details[2]
    assert "(2 more.)" in error.detail


def test_ten_of_many_mismatches_are_named_and_the_others_counted(storage: MemoryStorage) -> None:
    for uri, hidden in ((BASE, 64), (MATH, 32), (CODE, 64)):
        replace_checkpoint(storage, uri, llama_tensors(layers=6, hidden=hidden))
    [fault] = refusal(storage, TASK_ARITHMETIC).faults
    assert fault.code == "shape_mismatch"
    assert f"{MATH} has 27 tensors of another shape than {BASE}" in fault.detail
    assert fault.detail.count("instead of") == 10
    assert fault.detail.endswith("and 17 more.")


def test_integers_in_the_place_of_floats_are_refused(storage: MemoryStorage) -> None:
    replace_checkpoint(storage, MATH, llama_tensors() | {"model.norm.weight": ("U8", (64,))})
    error = refusal(storage, TASK_ARITHMETIC)
    assert faults(error) == [("/models/0/model", "dtype_unsupported")]
    assert "model.norm.weight U8 instead of BF16" in error.detail


@pytest.mark.parametrize(("uri", "pointer"), [(BASE, "/base_model"), (CODE, "/models/1/model")])
def test_quantised_checkpoint_is_refused(storage: MemoryStorage, uri: str, pointer: str) -> None:
    config = {**LLAMA_CONFIG, "quantization_config": {"quant_method": "fp8"}}
    replace_checkpoint(storage, uri, llama_tensors(), config=config)
    error = refusal(storage, TASK_ARITHMETIC)
    assert faults(error) == [(pointer, "dtype_unsupported")]
    assert "is quantised (fp8" in error.detail


@pytest.mark.parametrize(
    ("weight", "dtype", "scale"),
    [
        (
            "model.layers.0.mlp.up_proj.weight",
            "F8_E4M3",
            "model.layers.0.mlp.up_proj.weight_scale_inv",
        ),
        ("model.layers.0.mlp.up_proj.weight", "F8_E4M3", "model.layers.0.mlp.up_proj.weight_scale"),
        (
            "model.layers.0.mlp.experts.down_proj_blocks",
            "U8",
            "model.layers.0.mlp.experts.down_proj_scales",
        ),
        ("model.layers.0.mlp.up_proj.qweight", "I32", "model.layers.0.mlp.up_proj.scales"),
    ],
)
def test_weights_with_scales_are_refused_by_name_whatever_the_config_says(
    storage: MemoryStorage, weight: str, dtype: str, scale: str
) -> None:
    shape = llama_tensors().get(weight, ("", (8, 8)))[1]
    scaled = {weight: (dtype, shape), scale: ("F32", (1, 1))}
    for uri in (BASE, MATH, CODE):
        replace_checkpoint(storage, uri, llama_tensors() | scaled)
    error = refusal(storage, TASK_ARITHMETIC)
    pointers = {"/base_model", "/models/0/model", "/models/1/model"}
    assert {pointer for pointer, _ in faults(error)} == pointers
    assert {code for _, code in faults(error)} == {"dtype_unsupported"}
    assert all(weight in fault.detail for fault in error.faults)
    assert all("Convert it to bfloat16 first" in fault.detail for fault in error.faults)


def test_every_model_that_cannot_be_read_is_reported(storage: MemoryStorage) -> None:
    storage.write_bytes(f"{MATH}/model-00001-of-00002.safetensors", b"broken")
    recipe = {**TASK_ARITHMETIC, "models": [{"model": MATH}, {"model": "mem://models/none"}]}
    error = refusal(storage, recipe)
    assert isinstance(error, CheckpointError)
    assert faults(error) == [
        ("/models/0/model", "header_invalid"),
        ("/models/1/model", "not_found"),
    ]
    assert "(1 more models have faults.)" in error.detail


def test_every_address_that_is_not_allowed_is_reported(storage: MemoryStorage) -> None:
    recipe = {**TASK_ARITHMETIC, "base_model": "/etc", "models": [{"model": "s3://other/x"}]}
    error = refusal(storage, recipe)
    assert isinstance(error, StorageError)
    assert faults(error) == [("/models/0/model", "bad_uri"), ("/base_model", "bad_uri")]


# The output


@pytest.mark.parametrize(
    ("output", "relation"),
    [(BASE, "is the input"), (f"{CODE}/merged", "is inside"), ("mem://models", "contains")],
)
def test_output_that_touches_an_input_is_refused(
    storage: MemoryStorage, output: str, relation: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(storage, TASK_ARITHMETIC, output, overwrite=True)
    assert caught.value.code == "incompatible_options"
    assert relation in caught.value.detail


def test_output_beside_an_input_with_a_longer_name_is_accepted(storage: MemoryStorage) -> None:
    assert plan(storage, TASK_ARITHMETIC, f"{BASE}-merged").output_uri == f"{BASE}-merged"


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors"],
)
def test_output_that_holds_a_checkpoint_is_refused_unless_it_may_be_replaced(
    storage: MemoryStorage, name: str
) -> None:
    storage.write_bytes(f"{OUTPUT}/{name}", b"x")
    error = refusal(storage, TASK_ARITHMETIC)
    assert isinstance(error, PlanError)
    assert error.code == "output_exists"
    assert name in error.detail
    assert "overwrite" in error.detail
    assert plan(storage, TASK_ARITHMETIC, overwrite=True).overwrite


def test_shards_of_an_unfinished_merge_do_not_bar_its_output(storage: MemoryStorage) -> None:
    storage.write_bytes(f"{OUTPUT}/model-00001-of-00002.safetensors", b"x")
    storage.write_bytes(f"{OUTPUT}/{WORKSPACE}/in-progress", b"sha256:0")
    assert plan(storage, TASK_ARITHMETIC).output_uri == OUTPUT
    storage.write_bytes(f"{OUTPUT}/model.safetensors.index.json", b"{}")
    assert refusal(storage, TASK_ARITHMETIC).code == "output_exists"


def test_other_files_at_the_output_do_not_bar_it(storage: MemoryStorage) -> None:
    storage.write_bytes(f"{OUTPUT}/README.md", b"x")
    storage.write_bytes(f"{OUTPUT}/sub/model.safetensors", b"x")
    assert plan(storage, TASK_ARITHMETIC).output_uri == OUTPUT


# Memory


def test_tensor_that_does_not_fit_is_named_with_bytes_budget_and_advice(
    storage: MemoryStorage,
) -> None:
    for uri in (BASE, MATH, CODE):
        replace_checkpoint(storage, uri, llama_tensors(hidden=256, vocab=64))
    error = refusal(storage, WUDI, memory_budget="1MiB")
    assert isinstance(error, PlanError)
    assert error.code == "does_not_fit"
    needed = error.context["needed_bytes"]
    assert needed > 1 << 20
    assert error.context["tensor_name"] == "model.layers.0.mlp.down_proj.weight"
    for text in (repr(error.context["tensor_name"]), f"{needed} bytes", f"budget is {1 << 20}"):
        assert text in error.detail
    assert f"Set memory_budget to {needed} or more" in error.detail
    assert plan(storage, WUDI, memory_budget=needed).totals.max_host_bytes == needed


def test_method_that_works_in_tiles_fits_where_the_tensor_does_not(
    storage: MemoryStorage,
) -> None:
    for uri in (BASE, MATH, CODE):
        replace_checkpoint(storage, uri, {"w": ("BF16", (2048, 1024))})
    found = plan(storage, TASK_ARITHMETIC, memory_budget="4MiB")
    assert found.totals.max_host_bytes <= 4 << 20 < problems(found)["w"].bytes_read


def test_tensor_larger_than_a_file_is_warned_of(storage: MemoryStorage) -> None:
    found = plan(storage, TASK_ARITHMETIC, max_shard_size=10_000)
    assert "larger than max_shard_size (10000 bytes)" in found.warnings[0]
    assert all(s.size <= 10_000 or len(s.problems) == 1 for s in found.shards)
