from __future__ import annotations

import datetime
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merging.errors import Fault, RecipeError
from merging.method import all_methods
from merging.recipe import parse_recipe, validate_recipe
from merging.recipe.addresses import split_adapter
from merging.selectors import Conditions, Gradient

TIES = """
# A recipe as mergekit users write them.
models:
  - model: models/base
    # no parameters for the base
  - model: models/math
    parameters:
      density: [1, 0.7, 0.1]  # a gradient over the layers
      weight: 1.0
  - model: s3://bucket/code
    parameters:
      density: 0.5
      weight:
        - filter: mlp
          value: 5e-1
        - value: 0
merge_method: ties
base_model: models/base
parameters:
  normalize: true
dtype: float16
"""


def faults_of(document: Any) -> list[Fault]:
    recipe, faults = validate_recipe(document)
    assert recipe is None
    assert faults
    return faults


def linear(**changes: Any) -> dict[str, Any]:
    recipe = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], **changes}
    return {key: value for key, value in recipe.items() if value is not ...}


def expect(document: Any, pointer: str, code: str, *texts: str) -> None:
    """Exactly one fault, at that place, whose sentence holds the texts."""
    faults = faults_of(document)
    assert [(fault.pointer, fault.code) for fault in faults] == [(pointer, code)], faults
    for text in texts:
        assert text in faults[0].detail


def test_mergekit_recipe_is_read() -> None:
    recipe = parse_recipe(TIES)
    assert recipe.merge_method == "ties"
    assert recipe.base_model == "models/base"
    assert [entry.model for entry in recipe.models] == [
        "models/base", "models/math", "s3://bucket/code",
    ]  # fmt: skip
    assert recipe.dtype == "float16"
    assert recipe.models[1].parameters["density"] == Gradient((1.0, 0.7, 0.1))
    weight = recipe.models[2].parameters["weight"]
    assert isinstance(weight, Conditions)
    assert [(c.filter, c.value) for c in weight.entries] == [("mlp", 0.5), (None, 0.0)]


def test_text_bytes_json_and_mapping_give_the_same_recipe() -> None:
    import yaml

    data = yaml.safe_load(TIES.replace("5e-1", "0.5"))
    digests = {
        parse_recipe(document).digest
        for document in (
            TIES,
            TIES.encode(),
            b"\xef\xbb\xbf" + TIES.encode(),
            json.dumps(data),
            data,
        )
    }
    assert len(digests) == 1


def test_digest_does_not_depend_on_key_order_number_form_or_spelled_out_defaults() -> None:
    one = {
        "merge_method": "linear",
        "models": [{"model": "a", "parameters": {"weight": 2}}, {"model": "b"}],
    }
    other = {
        "parameters": {"normalize": True, "weight": 1},
        "models": [
            {"parameters": {"weight": 2.0}, "model": "a"},
            {"model": "b", "parameters": {"weight": 1.0}},
        ],
        "merge_method": "linear",
        "dtype": None,
    }
    assert parse_recipe(one) == parse_recipe(other)
    assert parse_recipe(one).digest == parse_recipe(other).digest
    assert parse_recipe(one).digest.startswith("sha256:")


def test_digest_depends_on_everything_that_matters() -> None:
    documents = [
        linear(),
        linear(merge_method="task_arithmetic", base_model="c"),
        linear(models=[{"model": "b"}, {"model": "a"}]),
        linear(dtype="float32"),
        linear(out_dtype="float32"),
        linear(parameters={"normalize": False}),
        linear(parameters={"weight": 2}),
        linear(name="mine"),
    ]
    assert len({parse_recipe(document).digest for document in documents}) == len(documents)


def test_default_given_to_one_model_is_kept_where_the_recipe_gives_another_to_all() -> None:
    recipe = parse_recipe(
        linear(
            models=[{"model": "a", "parameters": {"weight": 1}}, {"model": "b"}],
            parameters={"weight": 3},
        )
    )
    assert recipe.models[0].parameters == {"weight": 1.0}


def test_normalised_recipe_reads_back_to_itself() -> None:
    recipe = parse_recipe(TIES)
    assert parse_recipe(recipe.normalised()) == recipe
    assert parse_recipe(json.dumps(recipe.normalised())).digest == recipe.digest


def test_recipe_does_not_share_data_with_what_it_was_read_from() -> None:
    data = linear(models=[{"model": "a", "parameters": {"weight": [0, 1]}}])
    recipe = parse_recipe(data)
    data["models"][0]["parameters"]["weight"][0] = 9
    assert recipe.models[0].parameters["weight"] == Gradient((0.0, 1.0))


def test_exponents_without_a_point_are_numbers() -> None:
    recipe = parse_recipe("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1e-5}}]")
    assert recipe.models[0].parameters["weight"] == 1e-5


def test_aliases_may_repeat_a_value() -> None:
    recipe = parse_recipe(
        "merge_method: linear\n"
        "models:\n"
        "- {model: a, parameters: &p {weight: [0.5, 0.6]}}\n"
        "- {model: b, parameters: *p}\n"
    )
    assert recipe.models[0].parameters == recipe.models[1].parameters


def test_int8_mask_is_accepted_with_a_warning() -> None:
    recipe = parse_recipe(linear(parameters={"int8_mask": True}))
    assert recipe == parse_recipe(linear())
    assert "'int8_mask' only saves memory" in recipe.warnings[0]


def test_parameters_of_the_base_are_accepted_with_a_warning() -> None:
    recipe = parse_recipe(
        linear(
            merge_method="task_arithmetic",
            base_model="a",
            models=[{"model": "a", "parameters": {"weight": 2}}, {"model": "b"}],
        )
    )
    assert recipe.models[0].parameters == {}
    assert "no parameters for the base model" in recipe.warnings[0]


def test_all_faults_are_reported_at_once() -> None:
    faults = faults_of(
        {
            "merge_method": "ties",
            "models": [
                {"model": "a+", "parameters": {"density": 7}},
                {"modle": "c"},
                {"model": "d", "parameters": {"densty": 0.5, "weight": float("nan")}},
            ],
            "parametres": {},
            "dtype": "bf16",
        }
    )
    assert {fault.pointer for fault in faults} == {
        "/models/0/model", "/models/0/parameters/density", "/models/1", "/models/1/modle",
        "/models/2/parameters/densty", "/models/2/parameters/weight", "/parametres", "/dtype",
        "/base_model",
    }  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"merge_method": "linear", "models": [{"model": "a"}], "x": 1, "y": 2})
    assert caught.value.code == "invalid_recipe"
    assert caught.value.detail.endswith("(1 more in the recipe.)")
    assert len(caught.value.faults) == 2


def test_unknown_method_names_the_nearest() -> None:
    expect(linear(merge_method="linaer"), "/merge_method", "unknown_method", "linaer", "linear")


def test_one_kind_of_fault_gives_the_error_its_code() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(linear(merge_method="linaer"))
    assert caught.value.code == "unknown_method"


@pytest.mark.parametrize(
    ("changes", "pointer", "texts"),
    [
        ({"merge_metod": "x"}, "/merge_metod", ["'merge_method'"]),
        ({"zzz": 1}, "/zzz", ["Known here: base_model"]),
        ({"a/b~": 1}, "/a~1b~0", ["Unknown key"]),
        ({"merge_method": ...}, "/merge_method", ["is missing"]),
        ({"merge_method": 3}, "/merge_method", ["is a text, not 3"]),
        ({"models": ...}, "/models", ["is missing"]),
        ({"models": []}, "/models", ["a list of models, not []"]),
        ({"models": {"model": "a"}}, "/models", ["a list of models"]),
        ({"models": ["a"]}, "/models/0", ["a mapping with the key 'model', not \"a\""]),
        ({"models": [{"model": 3}]}, "/models/0/model", ["A model is a path", "not 3"]),
        ({"models": [{"model": "base+one+two"}]}, "/models/0/model", ["one adapter"]),
        ({"models": [{"model": "base+"}]}, "/models/0/model", ["'model+adapter'"]),
        ({"models": [{"model": "hf://org/x"}]}, "/models/0/model", ["download the model"]),
        ({"models": [{"model": "https://x/y"}]}, "/models/0/model", ["https:// are not supported"]),
        ({"models": [{"model": "a\nb"}]}, "/models/0/model", ["one line"]),
        ({"models": [{"model": "a", "weight": 1}]}, "/models/0/weight", ["model, parameters"]),
        ({"dtype": "floot16"}, "/dtype", ["float16"]),
        ({"out_dtype": "int64"}, "/out_dtype", ["not a float type"]),
        ({"name": ["a"]}, "/name", ["is a text"]),
        ({"chat_template": "chatlm"}, "/chat_template", ["'chatml'"]),
        ({"chat_template": ["chatml"]}, "/chat_template", ["is a text"]),
    ],
)
def test_malformed_recipe_is_refused(
    changes: dict[str, Any], pointer: str, texts: list[str]
) -> None:
    expect(linear(**changes), pointer, "invalid_recipe", *texts)


@pytest.mark.parametrize(
    ("changes", "pointer", "text"),
    [
        (
            {"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]},
            "/slices",
            "one of 'models', 'slices' and 'modules'",
        ),
        (
            {"modules": {"encoder": {"models": [{"model": "a"}]}}},
            "/modules",
            "one of 'models', 'slices' and 'modules'",
        ),
        (
            {"tokenizer": {"source": "base"}, "tokenizer_source": "base"},
            "/tokenizer_source",
            "not both",
        ),
        ({"output": "x"}, "/output", "beside the recipe"),
        (
            {"models": [{"model": "a", "layer_range": [0, 4]}]},
            "/models/0/layer_range",
            "belong to 'slices'",
        ),
        ({"base_model": "c"}, "/base_model", "linear uses no base model"),
        ({"merge_method": "ties"}, "/base_model", "ties needs a base model"),
        (
            {"merge_method": "ties", "base_model": "a", "models": [{"model": "a/"}]},
            "/models",
            "at least 1 models besides the base model; the recipe has 0",
        ),
    ],
)
def test_what_this_version_or_method_does_not_do_is_refused_with_a_sentence(
    changes: dict[str, Any], pointer: str, text: str
) -> None:
    expect(linear(**changes), pointer, "incompatible_options", text)


def test_base_of_a_method_without_one_may_be_named_among_the_models() -> None:
    assert parse_recipe(linear(base_model="b")).base_model == "b"


def ties(parameters: dict[str, Any], of_model: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a", "parameters": of_model or {}}, {"model": "b"}],
        "parameters": parameters,
    }


@pytest.mark.parametrize(
    ("parameters", "pointer", "texts"),
    [
        ({"densty": 0.5}, "/parameters/densty", ['"densty"', "'density'"]),
        ({"density": 1.5}, "/parameters/density", ["less than or equal to 1", "not 1.5"]),
        ({"density": True}, "/parameters/density", ["a number", "not true"]),
        ({"density": "0.5"}, "/parameters/density", ["a number"]),
        ({"density": None}, "/parameters/density", ["not null"]),
        ({"density": [0.1, 7, 0.2]}, "/parameters/density/1", ["not 7"]),
        ({"density": [0.1, "x"]}, "/parameters/density", ["a number"]),
        ({"density": []}, "/parameters/density", ["a number"]),
        ({"density": {"value": 7}}, "/parameters/density/value", ["not 7"]),
        (
            {"density": [{"filter": "mlp", "value": [0.1, -1]}, {"value": 1}]},
            "/parameters/density/0/value/1",
            ["greater than", "not -1"],
        ),
        ({"density": [{"filter": "mlp"}]}, "/parameters/density/0", ["needs a 'value'"]),
        ({"normalize": 1}, "/parameters/normalize", ["a boolean", "not 1"]),
        ({"normalize": [0, 1]}, "/parameters/normalize", []),
        ({"rest": "men"}, "/parameters/rest", ["'base' or 'mean'"]),
        ({"rest": {"value": "mean"}}, "/parameters/rest", ["takes no entries with filters"]),
        ({"touch": "everything"}, "/parameters/touch", ["expected all, linear"]),
        ({"touch": ["("]}, "/parameters/touch", ["not a regular expression"]),
    ],
)
def test_bad_parameter_of_the_merge_is_refused(
    parameters: dict[str, Any], pointer: str, texts: list[str]
) -> None:
    faults = faults_of(ties(parameters))
    assert {fault.code for fault in faults} == {"bad_parameter"}
    assert faults[0].pointer.startswith(pointer)
    for text in texts:
        assert text in faults[0].detail


def test_parameters_that_are_no_mapping_are_refused() -> None:
    expect(linear(parameters=[1]), "/parameters", "bad_parameter", "mapping of names")


def test_bad_parameter_of_a_model_is_refused_at_its_place() -> None:
    expect(ties({}, {"density": 2}), "/models/0/parameters/density", "bad_parameter", "not 2")


def test_parameter_of_the_whole_merge_is_refused_at_one_model() -> None:
    expect(
        ties({}, {"normalize": True}),
        "/models/0/parameters/normalize",
        "bad_parameter",
        "move it to the recipe's own 'parameters'",
    )


def test_parameter_of_experts_may_be_given_for_all_at_once() -> None:
    assert parse_recipe(ties({"density": 0.3})).parameters == {"density": 0.3}


def test_whole_number_cannot_be_a_gradient() -> None:
    document = {
        "merge_method": "wudi",
        "base_model": "base",
        "models": [{"model": "a"}],
        "parameters": {"steps": [100, 300]},
    }
    expect(document, "/parameters/steps", "bad_parameter", "over the layers")


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_every_method_accepts_its_own_defaults_spelled_out(name: str) -> None:
    method = all_methods()[name]
    needs_base = {"base_model": "base"} if method.needs_base else {}
    models = [{"model": f"m{i}"} for i in range(max(method.min_experts, 1))]
    document = {"merge_method": name, "models": models, **needs_base}
    if method.calibrated:
        document["calibration"] = {"data": "samples.jsonl"}
    defaults = {
        **method.expert_parameters().model_dump(mode="json", by_alias=True),
        **method.parameters().model_dump(mode="json", by_alias=True),
    }
    assert parse_recipe({**document, "parameters": defaults}) == parse_recipe(document)


LAUGHS = "\n".join(
    ["l0: &l0 [x, x]"] + [f"l{i}: &l{i} [*l{i - 1}, *l{i - 1}]" for i in range(1, 45)]
)


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ("", "is empty"),
        ("recipe.yaml", "rather than a file name"),
        ("- a", "is a list"),
        ("a: 1\na: 2", "'a' stands twice (again at line 2)"),
        ("models:\n- {model: a, model: b}", "'model' stands twice"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"a": {"b": 1, "b": 2}}', "'b' stands twice"),
        ("1: a", "'1' at line 1 is not text"),
        ("on: a", "'on' at line 1 is not text"),
        ("null: a", "is not text"),
        ("[a, b]: c", "a collection at line 1 is not text"),
        ("a: &x {b: 1}\nc: {<<: *x}", "merge key"),
        ("a: !!python/object/apply:os.system [ls]", "has the tag"),
        ("a: !!binary aGk=", "has the tag"),
        ("a: !custom 1", "has the tag"),
        ("a: &a [*a]", "deeper than 50"),
        ("a: " + "[" * 60 + "]" * 60, "deeper than 50"),
        ('{"a": ' + "[" * 60 + "]" * 60 + "}", "deeper than 50"),
        ('{"a":' * 100_000, "deeper than 50"),
        ("[" * 400_000, "deeper than 50"),
        (LAUGHS, "more than 20000 values"),
        ("a: &x 1\nb: [" + "*x, " * 200 + "]", "100 aliases"),
        ("a: [" + "x, " * 30_000 + "]", "more than 20000 values"),
        ('{"a": [' + "1, " * 30_000 + "1]}", "more than 20000 values"),
        ("a: " + "x" * 1_000_001, "at most 1000000"),
        ("a: " + "9" * 5000, "cannot be read"),
        ('{"a": ' + "9" * 5000 + "}", "too long"),
        (b"a: \xff", "not UTF-8"),
        ("a: \ud800", "not UTF-8"),
        ("a: \x00b", "not valid YAML"),
        ("a: [1, 2", "expected ',' or ']'"),
        ("a: b: c", "line 1, column 5"),
        ("\ta: 1", "not valid YAML"),
        ("a: *nowhere", "undefined alias"),
    ],
)  # fmt: skip
def test_document_that_is_a_trap_or_a_mess_is_refused(document: str | bytes, text: str) -> None:
    [fault] = faults_of(document)
    assert fault.code == "invalid_recipe"
    assert text in fault.detail


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (".nan", "not a finite"),
        (".inf", "not a finite"),
        ("-.INF", "not a finite"),
        ("1e999", "not a finite"),
        ("99999999999999999999", "too large"),
        ("2024-01-01", "put dates"),
        ('"a\\u0001b"', "control characters"),
    ],
)
def test_value_that_is_not_plain_data_is_refused_at_its_place(text: str, reason: str) -> None:
    document = f"merge_method: linear\nmodels: [{{model: a}}]\nname: {text}"
    expect(document, "/name", "invalid_recipe", reason)


@pytest.mark.parametrize(
    "value", [object(), datetime.date(2024, 1, 1), {1, 2}, b"x", float("inf"), 2**63, "\ud800"]
)
def test_mapping_with_values_that_are_not_plain_data_is_refused(value: Any) -> None:
    assert faults_of(linear(name=value))[0].pointer == "/name"


def test_json_constants_outside_of_json_are_refused() -> None:
    document = (
        '{"merge_method": "linear", "models": [{"model": "a"}], "parameters": {"weight": NaN}}'
    )
    expect(document, "/parameters/weight", "invalid_recipe", "not a finite")


def test_faults_of_a_hopeless_document_are_cut_off() -> None:
    assert len(faults_of({f"key{i}": i for i in range(1000)})) == 100


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
keys = st.sampled_from(
    ["model", "parameters", "weight", "density", "lambda", "filter", "value", "touch", "rest", "x"]
)
parameter_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.floats()
    | st.sampled_from(["*", "mlp", "all"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
near_recipes = st.fixed_dictionaries(
    {
        "merge_method": st.sampled_from([*all_methods(), "lienar"]) | json_values,
        "models": st.lists(
            st.fixed_dictionaries(
                {"model": st.sampled_from(["a", "s3://b/c", "c+d", ""]) | json_values},
                optional={"parameters": st.dictionaries(keys, parameter_values, max_size=3)},
            ),
            max_size=3,
        )
        | json_values,
    },
    optional={
        "base_model": st.sampled_from(["a", "z"]) | json_values,
        "parameters": st.dictionaries(keys, parameter_values, max_size=3) | json_values,
        "dtype": st.sampled_from(["float16", "bf16"]) | json_values,
        "slices": json_values,
    },
)
yaml_like = st.text(alphabet="ab:-[]{}&*!<>#|?,'\"\n \t0.1e~%@", max_size=60)


def check_total(document: Any) -> None:
    """A recipe that survives its own normal form, or a RecipeError with faults in sentences."""
    recipe, faults = validate_recipe(document)
    if recipe is not None:
        assert not faults
        assert parse_recipe(recipe.normalised()).digest == recipe.digest
        return
    assert faults
    assert all(fault.detail for fault in faults)
    with pytest.raises(RecipeError) as caught:
        parse_recipe(document)
    json.dumps(caught.value.to_dict()).encode()


fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@fuzz
@given(st.text() | st.binary() | yaml_like | yaml_like.map(lambda text: "{" + text))
def test_any_text_is_a_recipe_or_a_recipe_error(document: str | bytes) -> None:
    check_total(document)


@fuzz
@given(json_values.map(lambda value: json.dumps({"merge_method": value, "models": value})))
def test_any_json_is_a_recipe_or_a_recipe_error(document: str) -> None:
    check_total(document)


@fuzz
@given(near_recipes)
def test_anything_that_looks_like_a_recipe_is_one_or_a_recipe_error(document: Any) -> None:
    check_total(document)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("base", ("base", None)),
        ("models/base+adapters/x", ("models/base", "adapters/x")),
        ("./base+s3://bucket/x", ("./base", "s3://bucket/x")),
        ("s3://bucket/base+s3://bucket/x", ("s3://bucket/base", "s3://bucket/x")),
        ("s3://bucket/base+/data/x", ("s3://bucket/base", "/data/x")),
        ("s3://bucket/a+b", ("s3://bucket/a+b", None)),
        ("file:///models/a+b+file:///adapters/c+d", ("file:///models/a+b", "file:///adapters/c+d")),
    ],
)
def test_a_plus_stands_between_a_model_and_an_adapter(
    address: str, parts: tuple[str, str | None]
) -> None:
    assert split_adapter(address) == parts


def test_a_base_model_with_an_adapter_is_a_step_of_its_own() -> None:
    document = {
        "merge_method": "ties", "base_model": "./base+lora",
        "models": [{"model": "./base+lora"}, {"model": "./a"}, {"model": "./base"}],
    }  # fmt: skip
    recipe = parse_recipe(document)
    assert parse_recipe(recipe.normalised()) == recipe
    (step,) = recipe.documents
    assert [entry.model for entry in step.sections[0].entries] == ["./base+lora"]
    assert recipe.methods == ("passthrough", "ties")
    assert recipe.base_model == step.name
    assert [entry.model for entry in recipe.models] == [step.name, "./a", "./base"]


def test_within_documents_it_is_refused() -> None:
    inner = {"merge_method": "ties", "base_model": "b/c+lora", "models": [{"model": "./a"}]}
    told = "a document of its own"
    expect({"documents": [inner]}, "/documents/0/base_model", "incompatible_options", told)
