"""The command line: client of the service, and merges in this process."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from merging.errors import MergeError
from service import cli_admin, cli_remote
from service.cli_common import (
    AdapterRankOption,
    BudgetOption,
    DeviceBudgetOption,
    FiniteOption,
    JsonOption,
    OutputOption,
    OverwriteOption,
    RecipeArgument,
    SeedOption,
    ShardSizeOption,
    StatisticsOption,
    ThreadsOption,
    WorkersOption,
    print_json,
    read_recipe,
)

if TYPE_CHECKING:
    from merging.options import MergeOptions
    from merging.plan.plan import Plan
    from merging.storage.base import Storage

app = typer.Typer(
    name="mergeyard",
    help="Merge fine-tuned language models: on this machine, or as a service on a cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


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

    return make_plan(parse_recipe(read_recipe(recipe)), storage, options, output)


def _import_torch() -> None:
    """Import torch, whose objects are never garbage: looking for some is a fifth of its import."""
    gc.disable()
    import torch  # noqa: F401 - for those who import it next

    gc.freeze()
    gc.enable()


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
    statistics_uri: StatisticsOption = None,
    adapter_rank: AdapterRankOption = None,
    overwrite: OverwriteOption = False,
    check_finite: FiniteOption = True,
) -> None:
    """Merge in this process, without a service or a cluster; prints the output and its digest."""
    from merging.execute.memory import give_back_freed_memory
    from merging.storage.router import open_storage

    give_back_freed_memory()  # before planning starts threads
    options = _options(
        max_shard_size=max_shard_size,
        memory_budget=memory_budget,
        device_memory_budget=device_memory_budget,
        seed=seed,
        threads=threads,
        statistics_uri=statistics_uri,
        adapter_rank=adapter_rank,
        overwrite=overwrite,
        check_finite=check_finite,
    )
    storage = open_storage()
    _run(_make_plan(recipe, output, options, storage), storage, device)


def _run(plan: Plan, storage: Storage, device: str) -> None:
    """Run a plan in this process and print what it published."""
    from merging.local_run import run_plan
    from service.console import plan_progress, warn
    from workers.accelerator import choose_device
    from workers.measured import run_shard

    warn(plan.warnings)
    _import_torch()
    chosen = choose_device(device)
    with plan_progress(plan) as on_progress:
        report = run_plan(plan, storage, device=chosen, on_progress=on_progress, engine=run_shard)
    for result in report["output"].get("variants", [report["output"]]):
        print(f"{result['uri']}  {result['bytes']} bytes in {len(result['files'])} files")
        print(result["digest"])


@app.command()
def rebuild(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint that was merged by emr.")],
    task: Annotated[str, typer.Argument(help="The task's expert as in the recipe, or its number.")],
    output: OutputOption,
    base: Annotated[
        str | None, typer.Option(help="The base model, if it is no longer where it was.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    max_shard_size: ShardSizeOption = "5GB",
    memory_budget: BudgetOption = "4GiB",
    overwrite: OverwriteOption = False,
) -> None:
    """Make one task's own model out of a checkpoint merged by emr, its masks and the base model."""
    from merging.rebuild import plan_rebuild
    from merging.storage.router import open_storage

    options = _options(
        max_shard_size=max_shard_size, memory_budget=memory_budget, overwrite=overwrite
    )
    storage = open_storage()
    _run(plan_rebuild(checkpoint, task, storage, options, output, base_uri=base), storage, device)


@app.command()
def plan(
    recipe: RecipeArgument,
    output: OutputOption,
    max_shard_size: ShardSizeOption = "5GB",
    memory_budget: BudgetOption = "4GiB",
    device_memory_budget: DeviceBudgetOption = None,
    workers: WorkersOption = None,
    statistics_uri: StatisticsOption = None,
    adapter_rank: AdapterRankOption = None,
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
        statistics_uri=statistics_uri,
        adapter_rank=adapter_rank,
        overwrite=overwrite,
    )
    made = _make_plan(recipe, output, options, open_storage())
    summary = plan_summary(made, Forecast(cache_folder() / "rates.json").estimate(made))
    if as_json:
        print_json(summary)
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
        print_json([method.describe() for method in found])
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


app.add_typer(cli_remote.app)
app.add_typer(cli_admin.tokens, name="tokens")
app.add_typer(cli_admin.webhooks, name="webhooks")


if __name__ == "__main__":
    main()
