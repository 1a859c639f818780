"""The commands that talk to a service."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli_common import (
    DEFAULT_URL,
    AdapterRankOption,
    BudgetOption,
    DeviceBudgetOption,
    FiniteOption,
    JobArgument,
    JsonOption,
    OutputOption,
    OverwriteOption,
    RecipeArgument,
    SeedOption,
    ShardSizeOption,
    StatisticsOption,
    ThreadsOption,
    TokenOption,
    UrlOption,
    WorkersOption,
    connect,
    print_json,
    read_recipe,
)

if TYPE_CHECKING:
    from service.client import Client

app = typer.Typer()

LabelOption = Annotated[list[str] | None, typer.Option("--label", help="key=value; repeatable.")]
WatchOption = Annotated[bool, typer.Option("--watch", help="Stay and show progress.")]


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
    statistics_uri: StatisticsOption = None,
    adapter_rank: AdapterRankOption = None,
    overwrite: OverwriteOption = False,
    check_finite: FiniteOption = True,
    label: LabelOption = None,
    watch_it: WatchOption = False,
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
        "statistics_uri": statistics_uri,
        "adapter_rank": adapter_rank,
        "overwrite": overwrite,
        "check_finite": check_finite,
    }
    labels = _labels(label)
    with connect(url, token_file) as client:
        job = client.submit(read_recipe(recipe), output, options=options, labels=labels)
        print(job["id"], flush=True)
        if watch_it:
            _watch(client, job["id"])


@app.command()
def propose(
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
    statistics_uri: StatisticsOption = None,
    adapter_rank: AdapterRankOption = None,
    overwrite: OverwriteOption = False,
    check_finite: FiniteOption = True,
    as_json: JsonOption = False,
) -> None:
    """Have the service plan a merge and keep the plan; its id is the last line, for 'run'."""
    from service.console import print_plan

    options = {
        "max_shard_size": max_shard_size,
        "memory_budget": memory_budget,
        "device_memory_budget": device_memory_budget,
        "seed": seed,
        "threads": threads,
        "workers": workers,
        "statistics_uri": statistics_uri,
        "adapter_rank": adapter_rank,
        "overwrite": overwrite,
        "check_finite": check_finite,
    }
    with connect(url, token_file) as client:
        plan = client.plan(read_recipe(recipe), output, options=options)
    if as_json:
        print_json(plan)
    else:
        print_plan(plan)
        print(plan["id"])


@app.command()
def run(
    plan_id: Annotated[str, typer.Argument(help="Id of the plan, from 'propose'.")],
    url: UrlOption = DEFAULT_URL,
    token_file: TokenOption = None,
    label: LabelOption = None,
    watch_it: WatchOption = False,
) -> None:
    """Submit exactly the merge of a plan; refused if an input has changed since."""
    with connect(url, token_file) as client:
        job = client.run_plan(plan_id, labels=_labels(label))
        print(job["id"], flush=True)
        if watch_it:
            _watch(client, job["id"])


@app.command()
def retry(
    job_id: JobArgument,
    url: UrlOption = DEFAULT_URL,
    token_file: TokenOption = None,
    watch_it: WatchOption = False,
) -> None:
    """Queue a failed job again; the files that it finished are kept."""
    with connect(url, token_file) as client:
        job = client.retry(job_id)
        print(f"{job['id']} {job['state']}", flush=True)
        if watch_it:
            _watch(client, job_id)


@app.command()
def jobs(
    url: UrlOption = DEFAULT_URL,
    token_file: TokenOption = None,
    state: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    search: Annotated[
        str | None, typer.Option(help="Words in its id, method, addresses, labels or error.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List jobs, newest first."""
    from service.console import print_jobs

    with connect(url, token_file) as client:
        found = client.jobs(limit=limit, state=state, search=search)
    if as_json:
        print_json(found)
    else:
        print_jobs(found)


@app.command()
def watch(
    job_id: JobArgument, url: UrlOption = DEFAULT_URL, token_file: TokenOption = None
) -> None:
    """Follow a job until it ends; the exit status says how it ended."""
    with connect(url, token_file) as client:
        _watch(client, job_id)


@app.command()
def events(
    url: UrlOption = DEFAULT_URL,
    token_file: TokenOption = None,
    type_: Annotated[
        list[str] | None, typer.Option("--type", help="Only of this type; repeatable.")
    ] = None,
    state: Annotated[
        list[str] | None, typer.Option(help="Only after which a job is so; repeatable.")
    ] = None,
    label: LabelOption = None,
    after: Annotated[
        int | None, typer.Option(help="Go on after this position; else from now on.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Follow what happens to all jobs, a line for each event, until interrupted."""
    filters: dict[str, str | list[str]] = {"type": type_ or [], "state": state or []}
    filters |= {f"label.{name}": value for name, value in _labels(label).items()}
    with connect(url, token_file) as client:
        for event in client.all_events(after=after, **filters):
            if as_json:
                print(json.dumps(event), flush=True)
                continue
            what = (event["position"], event["subject"], event["type"], event["state"] or "")
            print(f"{event['time'][:19]}Z", *what, sep="  ", flush=True)


@app.command()
def logs(
    job_id: JobArgument,
    url: UrlOption = DEFAULT_URL,
    token_file: TokenOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends.")] = False,
) -> None:
    """Print what happened to a job, and what its workers had to say."""
    with connect(url, token_file) as client:
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
    with connect(url, token_file) as client:
        job = client.cancel(job_id, mode="now" if now else "orderly")
    print(f"{job['id']} {job['state']}")


@app.command()
def delete(
    job_id: JobArgument,
    url: UrlOption = DEFAULT_URL,
    token_file: TokenOption = None,
    output: Annotated[
        bool, typer.Option("--output", help="Remove the merged checkpoint too.")
    ] = False,
) -> None:
    """Forget a job that has ended; its checkpoint stays, unless it is to go too."""
    with connect(url, token_file) as client:
        client.delete(job_id, output="delete" if output else "keep")
    print(f"{job_id} deleted")


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
