"""The command line: client of the service, and merges in this process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from merging.errors import MergeError

if TYPE_CHECKING:
    from merging.options import MergeOptions
    from merging.plan.plan import Plan
    from merging.storage.base import Storage
    from service.client import Client

app = typer.Typer(
    name="mergeyard",
    help="Merge fine-tuned language models: on this machine, or as a service on a cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

RecipeArgument = Annotated[str, typer.Argument(help="Recipe file (YAML or JSON); - for stdin.")]
JobArgument = Annotated[str, typer.Argument(help="Id of the job.")]
OutputOption = Annotated[str, typer.Option("--output", "-o", help="Folder, file:// or s3:// URI.")]
UrlOption = Annotated[
    str, typer.Option(envvar="MERGEYARD_URL", help="Address of the service.", show_default=True)
]
TokenOption = Annotated[
    Path | None,
    typer.Option(help="File with the bearer token; MERGEYARD_TOKEN has precedence."),
]
ShardSizeOption = Annotated[str, typer.Option(help="Largest output file, as in 5GB.")]
BudgetOption = Annotated[str, typer.Option(help="Host memory for tensor buffers, as in 4GiB.")]
DeviceBudgetOption = Annotated[
    str | None, typer.Option(help="GPU memory for tensor buffers, as in 70GiB.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of random methods.")]
ThreadsOption = Annotated[int, typer.Option(help="Torch threads per shard.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(help="Workers to count on: layers that take longer than a share are divided."),
]
OverwriteOption = Annotated[bool, typer.Option(help="Replace a checkpoint at the output.")]
FiniteOption = Annotated[bool, typer.Option(help="Fail on NaN or infinity in an input.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

DEFAULT_URL = "http://127.0.0.1:8000"


def main() -> None:
    """Entry point: one clear line on bad input, never a trace."""
    try:
        app()
    except MergeError as error:
        _fail(error)


def _fail(error: MergeError) -> NoReturn:
    """Print an error, and those of its faults that its own line does not tell already."""
    print(f"error: {error.detail}", file=sys.stderr)
    for fault in error.faults:
        if fault.detail not in error.detail:
            where = f"{fault.pointer}: " if fault.pointer else ""
            print(f"  - {where}{fault.detail}", file=sys.stderr)
    sys.exit(1)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _print_version(is_wanted: bool) -> None:
    from importlib import metadata

    if is_wanted:
        print(f"mergeyard {metadata.version('mergeyard')}")
        raise typer.Exit


@app.callback()
def _accept_root_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """``--version`` is dealt with by its callback."""


# -- in this process


def _read_recipe(path: str) -> str:
    from merging.errors import RecipeError

    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode()
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"The recipe {path} is not UTF-8 text (byte {error.start}). Save it as UTF-8."
        ) from error


def _options(**values: Any) -> MergeOptions:
    from pydantic import ValidationError

    from merging.errors import Fault, RecipeError
    from merging.options import MergeOptions

    try:
        return MergeOptions(**values)
    except ValidationError as error:
        faults = []
        for item in error.errors():
            option = f"--{item['loc'][0]}".replace("_", "-")
            reason = item["msg"].removeprefix("Value error, ").replace("Input should", "it should")
            faults.append(Fault("", "bad_parameter", f"{option}: {reason}."))
        detail = faults[0].detail if len(faults) == 1 else f"{len(faults)} options cannot be used."
        raise RecipeError(detail, code="bad_parameter", faults=faults) from error


def _make_plan(recipe: str, output: str, options: MergeOptions, storage: Storage) -> Plan:
    from merging.plan.planner import make_plan
    from merging.recipe import parse_recipe

    return make_plan(parse_recipe(_read_recipe(recipe)), storage, options, output)


@app.command()
def merge(
    recipe: RecipeArgument,
    output: OutputOption,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    max_shard_size: ShardSizeOption = "5GB",
    memory_budget: BudgetOption = "4GiB",
    device_memory_budget: DeviceBudgetOption = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = 1,
    overwrite: OverwriteOption = False,
    check_finite: FiniteOption = True,
) -> None:
    """Merge in this process, without a service or a cluster; prints the output and its digest."""
    from merging.local_run import run_plan
    from merging.storage.router import open_storage
    from service.console import plan_progress, warn
    from workers.accelerator import choose_device
    from workers.measured import run_shard

    options = _options(
        max_shard_size=max_shard_size,
        memory_budget=memory_budget,
        device_memory_budget=device_memory_budget,
        seed=seed,
        threads=threads,
        overwrite=overwrite,
        check_finite=check_finite,
    )
    storage = open_storage()
    plan = _make_plan(recipe, output, options, storage)
    warn(plan.warnings)
    chosen = choose_device(device)
    with plan_progress(plan) as on_progress:
        report = run_plan(plan, storage, device=chosen, on_progress=on_progress, engine=run_shard)
    for result in report["output"].get("variants", [report["output"]]):
        print(f"{result['uri']}  {result['bytes']} bytes in {len(result['files'])} files")
        print(result["digest"])


@app.command()
def plan(
    recipe: RecipeArgument,
    output: OutputOption,
    max_shard_size: ShardSizeOption = "5GB",
    memory_budget: BudgetOption = "4GiB",
    device_memory_budget: DeviceBudgetOption = None,
    workers: WorkersOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a merge would read, compute and write; reads headers only.

    The time is that of this machine, known once it has merged something.
    """
    from merging.plan.summary import plan_summary
    from merging.storage.router import open_storage
    from service.console import print_plan
    from service.forecast import Forecast
    from workers.measured import cache_folder

    options = _options(
        max_shard_size=max_shard_size,
        memory_budget=memory_budget,
        device_memory_budget=device_memory_budget,
        workers=workers,
        overwrite=overwrite,
    )
    made = _make_plan(recipe, output, options, open_storage())
    summary = plan_summary(made, Forecast(cache_folder() / "rates.json").estimate(made))
    if as_json:
        _print_json(summary)
    else:
        print_plan(summary)


@app.command()
def verify(
    checkpoint: Annotated[str, typer.Argument(help="A merged checkpoint: folder or s3:// URI.")],
) -> None:
    """Read a merged checkpoint again and compare every weight file with its merge report."""
    from merging.storage.router import open_storage
    from merging.verify import verify_published

    files = verify_published(checkpoint, open_storage())
    size = sum(file.size for file in files)
    print(f"{checkpoint}  {size} bytes in {len(files)} files are as they were written")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method in full.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the merge methods, or describe one."""
    from merging.method import all_methods, get_method
    from service.console import print_method, print_methods

    if as_json:
        found = [get_method(name)] if name else list(all_methods().values())
        _print_json([method.describe() for method in found])
    elif name:
        print_method(get_method(name))
    else:
        print_methods(list(all_methods().values()))


# -- the service


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind [default: 127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port [default: 8000].")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where the service keeps its own.")] = None,
    storage_root: Annotated[
        list[str] | None,
        typer.Option(help="Prefix that jobs may read and write; repeatable."),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster to join instead of starting a local one.")
    ] = None,
) -> None:
    """Run the service. Every setting can also be given as MERGEYARD_… in the environment."""
    from service.main import serve as run
    from service.settings import load_settings

    given = {
        "host": host,
        "port": port,
        "data_dir": data_dir,
        "storage_roots": storage_root or None,
        "ray_address": ray_address,
    }
    run(load_settings(**{key: value for key, value in given.items() if value is not None}))


@app.command()
def migrate() -> None:
    """Bring the job database to the schema of this version; `serve` does so by itself.

    For deployments that do it apart, before new replicas start. Reads the settings of `serve`.
    """
    from service.main import migrate as run
    from service.settings import load_settings

    run(load_settings())
    print("The job database has the schema of this version.")


@app.command()
def submit(
    recipe: RecipeArgument,
    output: OutputOption,
    url: UrlOption = DEFAULT_URL,
    token_file: TokenOption = None,
    max_shard_size: ShardSizeOption = "5GB",
    memory_budget: BudgetOption = "4GiB",
    device_memory_budget: DeviceBudgetOption = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = 1,
    workers: WorkersOption = None,
    overwrite: OverwriteOption = False,
    check_finite: FiniteOption = True,
    label: Annotated[list[str] | None, typer.Option(help="key=value; repeatable.")] = None,
    watch_it: Annotated[bool, typer.Option("--watch", help="Stay and show progress.")] = False,
) -> None:
    """Submit a merge to the service; prints the job's id.

    Paths in the recipe and of the output are those of the service's machine.
    """
    options = {
        "max_shard_size": max_shard_size,
        "memory_budget": memory_budget,
        "device_memory_budget": device_memory_budget,
        "seed": seed,
        "threads": threads,
        "workers": workers,
        "overwrite": overwrite,
        "check_finite": check_finite,
    }
    labels = _labels(label)
    with _client(url, token_file) as client:
        job = client.submit(_read_recipe(recipe), output, options=options, labels=labels)
        print(job["id"], flush=True)
        if watch_it:
            _watch(client, job["id"])


@app.command()
def jobs(
    url: UrlOption = DEFAULT_URL,
    token_file: TokenOption = None,
    state: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List jobs, newest first."""
    from service.console import print_jobs

    with _client(url, token_file) as client:
        found = client.jobs(limit=limit, state=state)
    if as_json:
        _print_json(found)
    else:
        print_jobs(found)


@app.command()
def watch(
    job_id: JobArgument, url: UrlOption = DEFAULT_URL, token_file: TokenOption = None
) -> None:
    """Follow a job until it ends; the exit status says how it ended."""
    with _client(url, token_file) as client:
        _watch(client, job_id)


@app.command()
def logs(
    job_id: JobArgument,
    url: UrlOption = DEFAULT_URL,
    token_file: TokenOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
) -> None:
    """Print what happened to a job, and what its workers had to say."""
    with _client(url, token_file) as client:
        for line in client.logs(job_id, follow=follow):
            print(line, flush=True)


@app.command()
def cancel(
    job_id: JobArgument,
    url: UrlOption = DEFAULT_URL,
    token_file: TokenOption = None,
    now: Annotated[bool, typer.Option("--now", help="End worker processes at once.")] = False,
) -> None:
    """Cancel a job."""
    with _client(url, token_file) as client:
        job = client.cancel(job_id, mode="now" if now else "orderly")
    print(f"{job['id']} {job['state']}")


def _watch(client: Client, job_id: str) -> None:
    from service.client import ApiError
    from service.console import follow_job

    job = follow_job(client, job_id)
    if job["state"] == "succeeded":
        for output in job["output"].get("variants", [job["output"]]):
            print(f"succeeded  {output['uri']}")
        return
    error = job["error"] or {}
    reason = f": {error['detail']}" if error else ""
    raise ApiError({**error, "detail": f"job {job_id} {job['state']}{reason}"})


def _labels(pairs: list[str] | None) -> dict[str, str]:
    labels = {}
    for pair in pairs or []:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise typer.BadParameter(f"{pair!r} is not key=value", param_hint="--label")
        labels[key] = value
    return labels


def _client(url: str, token_file: Path | None) -> Client:
    from service.client import ApiError, Client
    from service.settings import default_data_dir

    token = os.environ.get("MERGEYARD_TOKEN", "")
    if not token:
        data_dir = Path(os.environ.get("MERGEYARD_DATA_DIR") or default_data_dir())
        path = token_file or data_dir / "admin-token"
        try:
            token = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ApiError(
                {
                    "code": "unauthenticated",
                    "detail": f"No token: MERGEYARD_TOKEN is not set and {path} cannot be read"
                    f" ({reason}). Name the token's file with --token-file.",
                }
            ) from error
    return Client(url, token)


if __name__ == "__main__":
    main()
