"""Bad input, as users meet it: one clear line, nothing broken, nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from merging.errors import StorageError
from merging.local_run import run_plan
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage
from tests.acceptance.bad_input_cases import CASES, QUERY, WEIGHTS, Case, Home
from tests.support.checkpoints import INDEX_NAME, Family
from tests.support.cli import Said, mergeyard
from tests.support.live_service import LiveService
from tests.support.merges import load_merged

MakeHome = Callable[[], Home]


@pytest.fixture
def home(tmp_path: Path, family: Family) -> Home:
    return Home(tmp_path / "home", family.base.parent)


def merge(home: Home, **options: Any) -> Said:
    recipe = home.folder / "recipe.json"
    recipe.write_text(json.dumps(home.recipe))
    arguments = [
        argument
        for name, value in options.items()
        for argument in (f"--{name.replace('_', '-')}", *([] if value is True else [value]))
    ]
    return mergeyard("merge", recipe, "--output", home.output, "--device", "cpu", *arguments)


def submit(service: LiveService, home: Home, **options: Any) -> httpx.Response:
    body = {"recipe": home.recipe, "output_uri": str(home.output), "options": options}
    headers = {"Authorization": f"Bearer {service.token}"}
    return httpx.post(f"{service.url}/v1/jobs", json=body, headers=headers, timeout=30)


def run_job(service: LiveService, home: Home, **options: Any) -> dict[str, Any]:
    """Submit what can only be seen to be wrong once it runs; the job as it ended."""
    response = submit(service, home, **options)
    assert response.status_code == 201, response.text
    with service.client() as client:
        return client.wait(response.json()["id"])


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_not_published(output: Path) -> None:
    """No reader finds a checkpoint, and there are no unfinished files."""
    assert not (output / INDEX_NAME).exists()
    assert not (output / "config.json").exists()
    assert not list(output.glob("*.safetensors"))
    assert not [path for path in output.rglob("*") if path.name.endswith(".tmp")]


# -- what headers and recipes tell, before any work


@pytest.mark.parametrize("name", CASES)
def test_the_command_line_says_what_is_wrong_in_one_line(name: str, home: Home) -> None:
    case: Case = CASES[name]
    case.spoil(home)
    before = files(home.folder)
    said = merge(home, **case.options)
    for part in case.says:
        assert part.format(home=home.folder) in said.error
    assert len(said.faults) >= len(case.faults)
    for part in case.faults:
        assert part.format(home=home.folder) in "\n".join(said.faults)
    (home.folder / "recipe.json").unlink()
    assert files(home.folder) == before


@pytest.mark.parametrize("name", CASES)
def test_the_service_says_the_same_and_makes_no_job(
    name: str, home: Home, service: LiveService
) -> None:
    case: Case = CASES[name]
    case.spoil(home)
    before = files(home.folder)
    jobs = service.store.counts()
    response = submit(service, home, **case.options)
    problem = response.json()
    assert (response.status_code, problem["code"]) == (case.status, case.code), problem
    assert response.headers["content-type"] == "application/problem+json"
    for part in case.says:
        assert part.format(home=home.folder) in problem["detail"]
    told = [f"{error.get('pointer')}: {error['detail']}" for error in problem["errors"]]
    for part in case.faults:
        assert part.format(home=home.folder) in "\n".join(told)
    assert service.store.counts() == jobs
    assert files(home.folder) == before


# -- recipes that are none

BOMB = (
    "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{here}: &{here} [{', '.join([f'*{there}'] * 9)}]\n"
        for there, here in zip("abcdefgh", "bcdefghi", strict=True)
    )
    + "merge_method: *i\n"
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"merge_method: t\xefes", "is not UTF-8 text (byte 15). Save it as UTF-8."),
        (b"", "this document is empty"),
        (b"- ties", "this document is a list"),
        (b"recipe.yaml", "give the recipe itself rather than a file name"),
        (b"models: [", "is not valid YAML"),
        (b"models: !!python/object/apply:os.system [id]", "a recipe has no tags"),
        (b"models: []\nmodels: []", "The key 'models' stands twice"),
        (BOMB.encode(), "values"),
    ],
    ids=["not UTF-8", "empty", "list", "file name", "broken", "tag", "key twice", "bomb"],
)
def test_text_that_is_no_recipe_is_refused(
    text: bytes, says: str, tmp_path: Path, service: LiveService
) -> None:
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "merged"
    recipe.write_bytes(text)
    assert says in mergeyard("merge", recipe, "-o", output).error
    if b"\xef" not in text:  # else it is no JSON either
        body = {"recipe": text.decode(), "output_uri": str(output)}
        headers = {"Authorization": f"Bearer {service.token}"}
        response = httpx.post(f"{service.url}/v1/jobs", json=body, headers=headers)
        assert (response.status_code, response.json()["code"]) == (422, "invalid_recipe")
        assert says in response.json()["detail"]
    assert not output.exists()


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "recipe.yaml"
    said = mergeyard("merge", missing, "-o", tmp_path / "merged")
    assert said.error == f"The recipe {missing} cannot be read: No such file or directory."


def test_options_that_cannot_be_used_are_refused_together(home: Home) -> None:
    said = merge(home, max_shard_size="5 potatoes", threads=0)
    assert said.error == "2 options cannot be used."
    assert said.faults == [
        "--max-shard-size: '5 potatoes' is not a size; write bytes or a unit, as in 5GB or 512MiB.",
        "--threads: it should be greater than or equal to 1.",
    ]


def test_a_device_that_is_not_there_is_refused(home: Home) -> None:
    said = mergeyard("merge", "-", "-o", home.output, "--device", "tpu", stdin=_text(home))
    assert said.error == "Device 'tpu' is unknown; write auto, cpu, cuda or cuda:N."
    assert not home.output.exists()


def _text(home: Home) -> bytes:
    return json.dumps(home.recipe).encode()


# -- what only the weights tell


@pytest.mark.parametrize(
    ("method", "value"),
    [("ties", "nan"), ("ties", "inf"), ("wudi", "nan"), ("wudi", "-inf"), ("linear", "nan")],
)
def test_a_value_that_is_not_finite_is_named(
    method: str, value: str, home: Home, service: LiveService
) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[QUERY][3, 5] = float(value)

    home.change(poison)
    home.recipe["merge_method"] = method
    if method == "linear":
        del home.recipe["base_model"]
    error = merge(home).error
    for part in (QUERY, str(home.expert / WEIGHTS), "flat index 101", "Repair"):
        assert part in error
    assert_not_published(home.output)
    job = run_job(service, home)
    assert (job["state"], job["error"]["code"]) == ("failed", "non_finite_input")
    assert job["error"]["detail"] == error
    assert_not_published(home.output)


def test_the_check_for_finite_values_can_be_turned_off(home: Home) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[QUERY][3, 5] = float("nan")

    home.change(poison)
    home.recipe["merge_method"] = "task_arithmetic"
    assert merge(home, no_check_finite=True).status == 0
    assert load_merged(home.output)[QUERY].isnan().sum() == 1


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "wudi", "wudi_cfs"])
def test_experts_that_equal_the_base_give_the_base(
    method: str, home: Home, family: Family, service: LiveService
) -> None:
    for expert in ("expert-0", "expert-1"):
        (home.folder / expert / WEIGHTS).write_bytes((home.base / WEIGHTS).read_bytes())
    home.recipe["merge_method"] = method
    assert merge(home).status == 0
    merged = load_merged(home.output)
    assert merged.keys() == family.base_state.keys()
    for name, tensor in family.base_state.items():
        assert torch.equal(merged[name], tensor), name
    job = run_job(service, home, overwrite=True)
    assert job["state"] == "succeeded", job["error"]


@pytest.mark.parametrize("method", ["linear", "ties", "wudi"])
def test_identical_experts_are_fine(method: str, home: Home, family: Family) -> None:
    weights = (home.expert / WEIGHTS).read_bytes()
    (home.folder / "expert-0" / WEIGHTS).write_bytes(weights)
    home.recipe["merge_method"] = method
    if method == "linear":
        del home.recipe["base_model"]
    assert merge(home).status == 0
    merged = load_merged(home.output)
    assert all(tensor.isfinite().all() for tensor in merged.values())
    if method == "linear":
        for name, tensor in family.expert_states[1].items():
            assert torch.equal(merged[name], tensor), name


# -- the output


def test_an_output_that_holds_a_checkpoint_is_replaced_only_on_demand(
    home: Home, service: LiveService
) -> None:
    assert merge(home).status == 0
    first = files(home.output)
    refusal = merge(home).error
    assert f"{home.output} already holds a checkpoint (model-00001-of-00001" in refusal
    assert "allow it to be replaced with overwrite" in refusal
    problem = submit(service, home).json()
    assert (problem["code"], problem["status"]) == ("output_exists", 409)
    assert problem["detail"] == refusal
    assert files(home.output) == first

    home.recipe["merge_method"] = "task_arithmetic"
    assert merge(home, overwrite=True, max_shard_size="50kB").status == 0
    second = files(home.output)
    index = json.loads((home.output / INDEX_NAME).read_text())
    names = {path.name for path in second if path.suffix == ".safetensors"}
    assert names == set(index["weight_map"].values())
    assert len(names) > 1

    job = run_job(service, home, overwrite=True)
    assert job["state"] == "succeeded", job["error"]
    assert {p.name for p in home.output.glob("*.safetensors")} == {
        "model-00001-of-00001.safetensors"
    }


def test_an_output_that_cannot_be_written_is_named(home: Home, service: LiveService) -> None:
    (home.folder / "occupied").write_text("a file")
    home.output = home.folder / "occupied" / "merged"
    error = merge(home).error
    for part in (str(home.output), "a part of the path is a file", "Choose another path"):
        assert part in error
    job = run_job(service, home)
    assert (job["state"], job["error"]["code"]) == ("failed", "denied")
    assert job["error"]["detail"] == error


def test_a_source_that_changes_during_the_merge_is_named(home: Home) -> None:
    storage = open_storage()
    options = MergeOptions(max_shard_size="50kB")
    plan = make_plan(parse_recipe(home.recipe), storage, options, str(home.output))
    source = home.expert / WEIGHTS

    def overwrite_once(shard_index: int, _: object) -> None:
        if shard_index == 0:
            save_file(load_file(source), source, metadata={"format": "pt"})

    assert len(plan.shards) > 1
    with pytest.raises(StorageError) as raised:
        run_plan(plan, storage, on_progress=overwrite_once)
    assert raised.value.code == "source_changed"
    assert f"{source} was overwritten after it was first looked at" in raised.value.detail
    assert not (home.output / INDEX_NAME).exists()
