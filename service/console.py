"""What the command line shows: progress bars and tables.

Bars are for terminals only; a pipe or a file gets a line for each state of a job. Rows of figures
and jobs are one line each, however long, so that ids and digests can be copied; only prose is
wrapped, and that in terminals only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from merging.execute.shard_run import ShardCounts
    from merging.method import MergeMethod
    from merging.plan.plan import Plan
    from service.client import Client

_UNLIMITED_WIDTH = 100_000


def _console(*, stderr: bool = False, wraps: bool = False) -> Console:
    """Nothing that is shown is markup: names and addresses come from anywhere."""
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not (wraps and console.is_terminal):
        console.width = _UNLIMITED_WIDTH
    return console


def warn(messages: Sequence[str]) -> None:
    """Warnings, a line each, on standard error."""
    console = _console(stderr=True)
    for message in messages:
        console.print(f"warning: {message}")


# -- progress


def _progress() -> Progress:
    console = _console(stderr=True, wraps=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


@contextmanager
def plan_progress(plan: Plan) -> Iterator[Callable[[int, ShardCounts], None]]:
    """A bar over the bytes of a plan that runs in this process."""
    done: dict[int, int] = {}
    tensors: dict[int, int] = {}
    total = plan.totals.bytes_read + plan.totals.bytes_written
    with _progress() as progress:
        task = progress.add_task(_describe(plan.method, 0, plan.totals.tensors), total=total)

        def on_progress(shard_index: int, counts: ShardCounts) -> None:
            done[shard_index] = counts.bytes_read + counts.bytes_written
            if plan.shards[shard_index].is_output:
                tensors[shard_index] = counts.tensors_solved
            description = _describe(plan.method, sum(tensors.values()), plan.totals.tensors)
            progress.update(task, completed=sum(done.values()), description=description)

        yield on_progress


def follow_job(client: Client, job_id: str) -> dict[str, Any]:
    """Show a job's progress from its event stream until it ends; returns the job."""
    job = client.job(job_id)
    with _progress() as progress:
        view = _JobView(progress, progress.add_task("", total=None), job)
        for event in client.events(job_id):
            view.show(event)
    return client.job(job_id)


class _JobView:
    """A job as one bar: state, tensors, bytes."""

    def __init__(self, progress: Progress, task: TaskID, job: Mapping[str, Any]) -> None:
        self._progress = progress
        self._task = task
        self._state = str(job["state"])
        self._counts: Mapping[str, Any] = job["progress"]
        self._update()

    def show(self, event: Mapping[str, Any]) -> None:
        data = event["data"]
        match event["type"]:
            case "job.state_changed":
                self._state = str(data["to"])
                if not self._progress.console.is_terminal:
                    self._tell(self._state)
            case "job.progress":
                self._counts = data["progress"]
            case "job.warning":
                self._tell(f"warning: {data['detail']}")
            case "shard.retried":
                reason = (data.get("error") or {}).get("detail", "")
                self._tell(f"shard {data['shard_index']} is tried again: {reason}")
        self._update()

    def _tell(self, line: str) -> None:
        self._progress.console.print(line)

    def _update(self) -> None:
        counts = self._counts
        self._progress.update(
            self._task,
            completed=counts["bytes_done"],
            total=counts["bytes_total"] or None,
            description=_describe(self._state, counts["tensors_done"], counts["tensors_total"]),
        )


def _describe(what: str, done: int, total: int) -> str:
    return f"{what}  {done}/{total} tensors" if total else what


# -- tables


def _table(*columns: str, whole: Sequence[str] = ()) -> Table:
    """A table without lines; where it wraps, the columns named ``whole`` do not."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in whole)
    return table


def _add_row(table: Table, *cells: object) -> None:
    table.add_row(*map(str, cells))


def print_plan(summary: Mapping[str, Any]) -> None:
    """A plan's summary: figures, inputs, output files; warnings go to standard error."""
    console = _console()
    figures = _table("figure", "value")
    figures.show_header = False
    for key, value in summary.items():
        if key != "object" and isinstance(value, int | float | str):
            shown = f"{value:,}" if isinstance(value, int) else value
            _add_row(figures, key.replace("_", " "), f"{value:.3g}" if key == "flops" else shown)
    estimate = summary["estimate"]
    time = f"{estimate['total_seconds']:.3g} s" if estimate else "not known before the first merge"
    _add_row(figures, "estimated time", time)
    for item in summary["inputs"]:
        _add_row(figures, item["role"], item["uri"])
    for document in summary["documents"]:
        _add_row(figures, "document", f"{document['name'] or 'published'} ({document['method']})")
    for variant in summary["variants"]:
        _add_row(figures, "variant", f"{variant['uri']} ({variant['method']})")
    console.print(figures)
    files = _table("file", "bytes", "tensors", "bytes read", "flops")
    for file in summary["files"]:
        size, read = f"{file['size']:,}", f"{file['bytes_read']:,}"
        name = file["name"] if file["kind"] == "weights" else f"({file['name']})"
        _add_row(files, name, size, file["tensors"], read, f"{file['flops']:.3g}")
    console.print()
    console.print(files)
    warn(summary["warnings"])


def print_methods(methods: Sequence[MergeMethod]) -> None:
    """One row a method; the one to start with is marked."""
    console = _console(wraps=True)
    table = _table("method", "base", "merges", "rest", "what it does", whole=["method"])
    for method in methods:
        name = f"{method.name} *" if method.recommended else method.name
        base = "needed" if method.needs_base else "optional" if method.optional_base else "-"
        _add_row(table, name, base, method.default_touch, method.default_rest, method.summary)
    console.print(table)
    console.print(
        "\n* Recommended to start with. 'merges' is what it merges by default: all float tensors,"
        " or the weights of linear layers; 'rest' is what the others become."
        "\nMore on one: mergeyard methods NAME"
    )


def print_method(method: MergeMethod) -> None:
    """One method in full."""
    console = _console(wraps=True)
    start = " Recommended to start with." if method.recommended else ""
    text = f"{method.name}: {method.title}\n\n{method.summary}{start}\n\nSource: {method.source}\n"
    console.print(text)
    table = _table("parameter", "of", "default", "meaning", whole=["parameter", "of"])
    for scope, model in (("merge", method.parameters), ("expert", method.expert_parameters)):
        for name, field in model.model_fields.items():
            default = "required" if field.is_required() else field.default
            default = "by method" if default is None else default
            _add_row(table, field.alias or name, scope, default, field.description or "")
    console.print(table)


def print_rows(rows: Sequence[Mapping[str, Any]], *columns: str) -> None:
    """One row each, of these members: lists in one cell, times to the second, null empty."""
    table = _table(*(name.removesuffix("_at") for name in columns))
    for row in rows:
        _add_row(table, *(_cell(name, row[name]) for name in columns))
    _console().print(table)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name.endswith("_at"):
        return f"{value[:19]}Z"
    return ",".join(value) if isinstance(value, list) else str(value)


def print_jobs(jobs: Sequence[Mapping[str, Any]]) -> None:
    """One row a job."""
    table = _table("id", "state", "method", "tensors", "created", "output")
    for job in jobs:
        progress = job["progress"]
        tensors = f"{progress['tensors_done']}/{progress['tensors_total']}"
        created = f"{job['created_at'][:19]}Z"
        _add_row(
            table,
            job["id"],
            job["state"],
            ", ".join(job["methods"]),
            tensors,
            created,
            job["output_uri"],
        )
    _console().print(table)
