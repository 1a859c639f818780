"""The command line: merges in this process, and as a client of a live service."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from merging.method import all_methods
from service.client import ApiError, Client
from tests.support.checkpoints import INDEX_NAME, Family, make_family
from tests.support.cli import Said, mergeyard
from tests.support.live_service import LiveService, live_service
from tests.support.merges import recipe, weight_bytes

REPOSITORY = Path(__file__).parents[2]
HEAVY = {"torch", "numpy", "ray", "boto3", "botocore", "sqlalchemy", "fastapi", "transformers"}

LOADED = """
import sys
from service.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("\\n" + " ".join(sys.modules))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def family(home: Path) -> Family:
    return make_family(home / "models", num_experts=2, hidden=32, vocab=64)


@pytest.fixture(scope="module")
def service(home: Path) -> Iterator[LiveService]:
    with live_service(home / "service", home) as live:
        yield live


@pytest.fixture
def connected(service: LiveService, monkeypatch: pytest.MonkeyPatch) -> LiveService:
    """The service, named by the environment."""
    monkeypatch.setenv("MERGEYARD_URL", service.url)
    monkeypatch.setenv("MERGEYARD_TOKEN", service.token)
    return service


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither colours, nor the settings of whoever runs the tests."""
    for name in ("FORCE_COLOR", "MERGEYARD_URL", "MERGEYARD_TOKEN", "MERGEYARD_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))


def write_recipe(folder: Path, family: Family, method: str = "ties", **parameters: Any) -> Path:
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(recipe(family, method, **parameters)))
    return path


def digest(said: Said) -> str:
    assert said.status == 0, said
    return said.out.splitlines()[-1]


def modules_loaded_by(*arguments: object) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


# -- starting


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], ["--version"], ["methods"]])
def test_help_and_methods_load_nothing_heavy(arguments: list[str]) -> None:
    loaded = modules_loaded_by(*arguments)
    assert "typer" in loaded
    assert not loaded & HEAVY


def test_planning_loads_nothing_heavy(family: Family, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, family)
    assert not modules_loaded_by("plan", path, "-o", tmp_path / "merged") & HEAVY
    assert mergeyard("merge", path, "-o", tmp_path / "other").status == 0  # rates are known now
    assert not modules_loaded_by("plan", path, "-o", tmp_path / "merged") & HEAVY


def test_without_a_command_there_is_help() -> None:
    said = mergeyard()
    assert said.status == 2
    for command in (
        *(
            "merge",
            "rebuild",
            "plan",
            "verify",
            "methods",
            "serve",
            "submit",
            "jobs",
            "watch",
            "events",
        ),
        *("propose", "run", "retry", "logs", "cancel", "delete", "tokens", "webhooks"),
    ):
        assert command in said.out + said.err


# -- merging in this process


def test_a_merge_takes_every_option_and_replaces_only_on_demand(
    family: Family, tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    command = (
        *("merge", write_recipe(tmp_path, family, "dare_ties", density=0.5), "--output", output),
        *("--device", "cpu", "--max-shard-size", "50kB", "--memory-budget", "64MiB"),
        *("--device-memory-budget", "1GiB", "--seed", 7, "--threads", 1, "--check-finite"),
    )
    said = mergeyard(*command)
    files = weight_bytes(output)
    size = sum(map(len, files.values()))
    assert len(files) > 1
    assert said.out.splitlines()[0] == f"{output}  {size} bytes in {len(files)} files"
    assert said.err == ""
    assert "already holds a checkpoint" in mergeyard(*command).error
    assert digest(mergeyard(*command, "--overwrite")) == digest(said)
    assert weight_bytes(output) == files
    kept = ("--statistics-uri", tmp_path / "kept")
    assert "looks at no samples" in mergeyard(*command, "--overwrite", *kept).error
    other_seed = (*command, "--overwrite", "--seed", 8)
    assert digest(mergeyard(*other_seed)) != digest(said)


def test_yaml_json_and_standard_input_give_the_same_digest(family: Family, tmp_path: Path) -> None:
    document = recipe(family, "wudi", steps=20)
    as_json = tmp_path / "recipe.json"
    as_json.write_text(json.dumps(document))
    as_yaml = write_recipe(tmp_path, family, "wudi", steps=20)
    digests = {
        digest(mergeyard("merge", as_yaml, "-o", tmp_path / "1")),
        digest(mergeyard("merge", as_json, "-o", tmp_path / "2")),
        digest(mergeyard("merge", "-", "-o", tmp_path / "3", stdin=as_yaml.read_bytes())),
        digest(mergeyard("merge", "-", "-o", tmp_path / "4", stdin=as_json.read_bytes())),
    }
    assert len(digests) == 1
    assert digests.pop().startswith("sha256:")


def test_warnings_go_to_standard_error(family: Family, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, family, density=[{"filter": "nowhere", "value": 0.1}])
    said = mergeyard("merge", path, "-o", tmp_path / "merged")
    assert said.err.startswith("warning: The filter 'nowhere'")
    assert said.err.count("\n") == 1
    assert said.out.count("\n") == 2


def test_a_tasks_own_model_is_rebuilt_of_what_emr_published(family: Family, tmp_path: Path) -> None:
    shared, own = tmp_path / "shared", tmp_path / "own"
    assert mergeyard("merge", write_recipe(tmp_path, family, "emr"), "-o", shared).status == 0
    by_number = mergeyard("rebuild", shared, 1, "-o", own)
    by_model = mergeyard("rebuild", shared, family.experts[0], "-o", tmp_path / "same")
    assert digest(by_number) == digest(by_model)
    assert mergeyard("verify", own).status == 0
    refused = mergeyard("rebuild", shared, "cats", "-o", tmp_path / "none")
    assert refused.status == 1
    assert "has no task 'cats'" in refused.error
    assert "has no task" not in refused.out


def test_a_sweep_prints_each_checkpoint_and_can_be_verified(family: Family, tmp_path: Path) -> None:
    variants = [{"name": n, "parameters": {"density": d}} for n, d in (("thin", 0.2), ("all", 1))]
    path, output = tmp_path / "sweep.yaml", tmp_path / "merged"
    path.write_text(yaml.safe_dump({**recipe(family, "ties"), "sweep": variants}))
    shown = mergeyard("plan", path, "-o", output).out
    assert f"{output}/thin (ties)" in shown
    assert f"{output}/all (ties)" in shown
    said = mergeyard("merge", path, "-o", output)
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines[::2]] == [f"{output}/thin", f"{output}/all"]
    alone = mergeyard("merge", write_recipe(tmp_path, family, density=0.2), "-o", tmp_path / "one")
    assert lines[1] == digest(alone)
    checked = mergeyard("verify", output)
    assert "in 2 files are as they were written" in checked.out
    assert mergeyard("verify", output / "thin").status == 0
    file = next((output / "all").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert str(file) in mergeyard("verify", output).error
    (output / "sweep_report.json").write_text(
        json.dumps({"output": {"files": [{"name": "../x", "size": 1, "sha256": ""}]}})
    )
    assert "names files in other folders ('../x')" in mergeyard("verify", output).error


def test_a_merged_checkpoint_can_be_verified(family: Family, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    mergeyard("merge", write_recipe(tmp_path, family), "-o", output, "--max-shard-size", "50kB")
    said = mergeyard("verify", output)
    assert said.status == 0
    assert said.out.endswith("are as they were written\n")
    file = sorted(output.glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    error = mergeyard("verify", output).error
    assert f"{file} ({len(data)} bytes) reads back with SHA-256" in error
    file.unlink()
    assert str(file) in mergeyard("verify", output).error


def test_what_was_not_merged_here_cannot_be_verified(family: Family, tmp_path: Path) -> None:
    error = mergeyard("verify", family.base).error
    assert f"{family.base}/merge_report.json is not there" in error
    (tmp_path / "merge_report.json").write_text("[]")
    assert "cannot be read" in mergeyard("verify", tmp_path).error
    report = {"output": {"files": [{"name": "../x", "size": 1, "sha256": ""}]}}
    (tmp_path / "merge_report.json").write_text(json.dumps(report))
    assert "names files in other folders ('../x')" in mergeyard("verify", tmp_path).error


# -- plans and methods


def test_a_plan_is_shown_and_nothing_is_written(family: Family, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    command = (
        *("plan", write_recipe(tmp_path, family), "-o", output),
        *("--max-shard-size", "50kB", "--memory-budget", "1GB"),
    )
    summary = json.loads(mergeyard(*command, "--json").out)
    assert summary["object"] == "plan_summary"
    assert summary["memory_budget"] == 10**9
    assert len(summary["files"]) == summary["shards"] > 1
    lines = mergeyard(*command).out.splitlines()
    told = {line.split()[0]: line for line in lines if line}
    assert summary["plan_digest"] in told["plan"]
    assert str(family.base) in told["base"]
    for file in summary["files"]:
        assert f"{file['size']:,}" in told[file["name"]]
    assert not output.exists()


def test_a_plan_with_overwrite_may_replace(family: Family, tmp_path: Path) -> None:
    path, output = write_recipe(tmp_path, family), tmp_path / "merged"
    mergeyard("merge", path, "-o", output)
    assert "already holds a checkpoint" in mergeyard("plan", path, "-o", output).error
    assert mergeyard("plan", path, "-o", output, "--overwrite").status == 0


def test_methods_are_listed_one_a_line_with_the_recommended_one_marked() -> None:
    table, _, legend = mergeyard("methods").out.partition("\n\n")
    header, *rows = table.splitlines()
    assert header.split()[0] == "method"
    assert [row.split()[0] for row in rows] == list(all_methods())
    recommended = [name for name, method in all_methods().items() if method.recommended]
    assert [row.split()[0] for row in rows if row.split()[1] == "*"] == recommended
    assert legend.startswith("* Recommended to start with.")


def test_one_method_is_shown_with_all_its_parameters() -> None:
    said = mergeyard("methods", "dare_ties")
    (described,) = json.loads(mergeyard("methods", "dare_ties", "--json").out)
    names = {*described["parameters"]["properties"], *described["expert_parameters"]["properties"]}
    shown = {line.split()[0]: line.split()[1] for line in said.out.splitlines() if line}
    assert names <= shown.keys()
    assert (shown["density"], shown["lambda"]) == ("expert", "merge")
    assert described["source"] in said.out


def test_all_methods_are_given_as_json() -> None:
    described = json.loads(mergeyard("methods", "--json").out)
    assert [method["name"] for method in described] == list(all_methods())


# -- the service


def test_a_job_is_submitted_followed_and_listed(
    connected: LiveService, family: Family, home: Path, tmp_path: Path
) -> None:
    path, output = write_recipe(tmp_path, family), home / "by-service"
    said = mergeyard(
        *("submit", path, "-o", output, "--max-shard-size", "50kB", "--seed", 3),
        *("--label", "team=vision", "--label", "note=a=b", "--watch"),
    )
    job_id, end = said.out.splitlines()
    assert (said.status, end) == (0, f"succeeded  {output}")
    states = [line for line in said.err.splitlines() if " " not in line]
    assert states == ["planning", "running", "publishing", "succeeded"][-len(states) :]
    assert (output / INDEX_NAME).exists()
    alone = mergeyard("merge", path, "-o", tmp_path / "alone", "--max-shard-size", "50kB")
    assert (
        digest(alone) == json.loads((output / "merge_report.json").read_text())["output"]["digest"]
    )

    (job,) = [job for job in json.loads(mergeyard("jobs", "--json").out) if job["id"] == job_id]
    assert job["labels"] == {"team": "vision", "note": "a=b"}
    assert job["seed"] == 3
    table = mergeyard("jobs", "--state", "succeeded", "--limit", 100).out.splitlines()
    assert table[0].split() == ["id", "state", "method", "tensors", "created", "output"]
    (row,) = [line.split() for line in table if line.startswith(job_id)]
    assert row == [job_id, "succeeded", "ties", "21/21", row[4], str(output)]
    assert mergeyard("watch", job_id).out == f"succeeded  {output}\n"
    assert mergeyard("logs", job_id, "--follow").out.splitlines()[-1].endswith("  succeeded")
    assert "succeeded" in mergeyard("cancel", job_id).error


def test_what_happens_to_all_jobs_is_followed(
    connected: LiveService, family: Family, home: Path, tmp_path: Path
) -> None:
    position = connected.store.news_bounds().last
    path = write_recipe(tmp_path, family)
    said = mergeyard("submit", path, "-o", home / "followed", "--label", "team=vision", "--watch")
    assert said.status == 0
    job_id = said.out.split()[0]
    assert [
        job["id"]
        for job in json.loads(mergeyard("jobs", "--search", f"{job_id} TIES", "--json").out)
    ] == [job_id]
    command = [
        sys.executable,
        "-m",
        "service.cli",
        "events",
        "--after",
        str(position),
        "--label",
        "team=vision",
    ]
    only = ["--type", "job.created", "--type", "job.finished"]
    with subprocess.Popen([*command, *only], stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout
        lines = [following.stdout.readline().split() for _ in range(2)]
        following.terminate()
    assert [line[2:] for line in lines] == [
        [job_id, "job.created", "queued"],
        [job_id, "job.finished", "succeeded"],
    ]


def test_a_job_is_deleted_with_what_it_published_only_on_demand(
    connected: LiveService, family: Family, home: Path, tmp_path: Path
) -> None:
    path, output = write_recipe(tmp_path, family), home / "to-be-deleted"

    def merge(*options: str) -> str:
        said = mergeyard("submit", path, "-o", output, "--watch", *options)
        assert said.status == 0, said
        return said.out.splitlines()[0]

    first, second = merge(), merge("--overwrite")
    assert f"job {second} published there later" in mergeyard("delete", first, "--output").error
    assert mergeyard("delete", first).out == f"{first} deleted\n"
    (output / "notes.txt").write_text("mine")
    report = (output / "merge_report.json").read_text()
    (output / "merge_report.json").write_text(
        report.replace('"plan_digest": "', '"plan_digest": "x')
    )
    assert "no longer what the merge published" in mergeyard("delete", second, "--output").error
    (output / "merge_report.json").write_text(report)
    assert mergeyard("delete", second, "--output").out == f"{second} deleted\n"
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
    assert "no job" in mergeyard("watch", second).error
    third = merge()  # the output is free again
    assert mergeyard("delete", third, "--output").status == 0


def test_tokens_are_made_listed_and_revoked(connected: LiveService) -> None:
    said = mergeyard("tokens", "create", "nightly", "--scope", "jobs:read", "--scope", "jobs:write")
    token_id, secret = said.out.split()
    with Client(connected.url, secret) as client:
        assert client.jobs(limit=1) is not None
        (row,) = [line.split() for line in mergeyard("tokens", "list").out.splitlines()
                  if line.startswith(token_id)]  # fmt: skip
        assert row[1:3] == ["nightly", "jobs:read,jobs:write"]
        assert secret not in mergeyard("tokens", "list", "--json").out
        assert mergeyard("tokens", "revoke", token_id).out == f"{token_id} revoked\n"
        with pytest.raises(ApiError, match="revoked"):
            client.jobs()
    assert mergeyard("tokens", "create", "x", "--scope", "all").status == 1


def test_webhook_endpoints_are_managed(connected: LiveService) -> None:
    url = "https://example.com/hook"
    said = mergeyard("webhooks", "create", url, "--event", "job.failed", "--format", "cloudevents")
    hook, secret = said.out.split()
    assert secret.startswith("whsec_")
    assert mergeyard("webhooks", "list").out.splitlines()[1].split()[:3] == [hook, "True", url]
    (found,) = json.loads(mergeyard("webhooks", "list", "--json").out)
    assert (found["events"], found["format"]) == (["job.failed"], "cloudevents")
    (delivery,) = mergeyard("webhooks", "test", hook).out.split()
    (replayed,) = mergeyard("webhooks", "replay", hook, delivery).out.split()
    listed = mergeyard("webhooks", "deliveries", hook).out.splitlines()[1:]
    assert {line.split()[0] for line in listed} == {delivery, replayed}
    rotated = mergeyard("webhooks", "rotate", hook, "--overlap-seconds", 60).out.split()
    assert rotated[0] == hook
    assert rotated[1] != secret
    assert mergeyard("webhooks", "delete", hook).out == f"{hook} deleted\n"
    assert "no webhook endpoint" in mergeyard("webhooks", "test", hook).error


def test_a_plan_is_proposed_and_then_run_as_it_is(
    connected: LiveService, family: Family, home: Path, tmp_path: Path
) -> None:
    path, output = write_recipe(tmp_path, family), home / "as-proposed"
    *shown, plan_id = mergeyard("propose", path, "-o", output, "--seed", 5).out.splitlines()
    assert plan_id.startswith("plan_")
    assert shown
    as_json = json.loads(mergeyard("propose", path, "-o", output, "--seed", 5, "--json").out)
    assert not output.exists()
    said = mergeyard("run", plan_id, "--label", "team=vision", "--watch")
    job_id, end = said.out.splitlines()
    assert end == f"succeeded  {output}"
    with connected.client() as client:
        job = client.job(job_id)
    assert (job["plan_id"], job["labels"]) == (plan_id, {"team": "vision"})
    assert job["plan_digest"] == as_json["plan_digest"]
    assert "only a failed job can be retried" in mergeyard("retry", job_id).error


def test_a_job_is_cancelled_and_says_so(
    connected: LiveService, family: Family, home: Path, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, family, "wudi", steps=10_000)
    submitted = mergeyard("submit", path, "-o", home / "cancelled", "--max-shard-size", "20kB")
    (job_id,) = submitted.out.split()
    with connected.client() as client:
        for event in client.events(job_id):
            if event["type"] == "shard.started":
                break
    said = mergeyard("cancel", job_id)
    assert said.out == f"{job_id} cancelling\n"
    assert f"job {job_id} cancelled" in mergeyard("watch", job_id).err.splitlines()[-1]
    assert mergeyard("cancel", job_id, "--now").out == f"{job_id} cancelled\n"
    assert not (home / "cancelled" / INDEX_NAME).exists()


def test_a_job_that_fails_ends_the_command_with_its_reason(
    connected: LiveService, family: Family, home: Path, tmp_path: Path
) -> None:
    (home / "a-file").write_text("in the way")
    path = write_recipe(tmp_path, family)
    said = mergeyard("submit", path, "-o", home / "a-file" / "merged", "--watch")
    assert said.status == 1
    assert len(said.out.split()) == 1
    last = said.err.splitlines()[-1]
    job_id = said.out.strip()
    assert last.startswith(f"error: job {job_id} failed: Cannot ")
    (home / "a-file").unlink()
    again = mergeyard("retry", job_id, "--watch").out.splitlines()
    assert again == [f"{job_id} queued", f"succeeded  {home / 'a-file' / 'merged'}"]
    assert "a part of the path is a file" in last


def test_a_refused_submission_lists_every_fault(
    connected: LiveService, family: Family, tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, family, density=2, lamda=1)
    said = mergeyard("submit", path, "-o", tmp_path / "merged")
    assert "density should be less than or equal to 1, not 2" in said.error
    (fault,) = said.faults
    assert "/parameters/lamda: Unknown parameter" in fault
    assert "Did you mean 'lambda'" in fault


def test_a_label_is_a_pair(connected: LiveService, family: Family, tmp_path: Path) -> None:
    said = mergeyard("submit", write_recipe(tmp_path, family), "-o", "/x", "--label", "vision")
    assert said.status == 2
    assert "'vision' is not key=value" in said.err


# -- what can be wrong with the connection


def test_the_token_comes_from_a_file_of_the_data_folder(
    service: LiveService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEYARD_DATA_DIR", str(tmp_path))
    refusal = mergeyard("jobs", "--url", service.url).error
    assert f"MERGEYARD_TOKEN is not set and {tmp_path}/admin-token cannot be read" in refusal
    assert "--token-file" in refusal
    (tmp_path / "admin-token").write_text(service.token + "\n")
    assert mergeyard("jobs", "--url", service.url).status == 0
    monkeypatch.delenv("MERGEYARD_DATA_DIR")
    token_file = tmp_path / "admin-token"
    assert mergeyard("jobs", "--url", service.url, "--token-file", token_file).status == 0


@pytest.mark.parametrize(
    ("token", "says"),
    [("wrong", "The token is not known"), ("nö", "characters that no token has")],
)
def test_a_wrong_token_is_one_clear_line(
    connected: LiveService, token: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEYARD_TOKEN", token)
    for command in (["jobs"], ["watch", "job_x"], ["cancel", "job_x"]):
        assert says in mergeyard(*command).error


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://[::1"])
def test_a_service_that_cannot_be_reached_is_one_clear_line(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEYARD_TOKEN", "any")
    for command in (["jobs"], ["watch", "job_x"]):
        error = mergeyard(*command, "--url", url).error
        assert f"No service answers at {url}" in error
        assert "mergeyard serve" in error


@pytest.mark.parametrize("job_id", ["job_00000000000000000000000000", "nonsense"])
def test_an_unknown_job_is_one_clear_line(connected: LiveService, job_id: str) -> None:
    for command in (["watch", job_id], ["cancel", job_id]):
        assert mergeyard(*command).error == f"There is no job {job_id}."
