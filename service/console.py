"""What the command line shows: progress bars and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    from merging.execute.shard import ShardCounts
    from merging.method import MergeMethod
    from merging.plan.plan import Plan
    from service.client import Client


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


@contextmanager
def plan_progress(plan: Plan) -> Iterator[Callable[[int, ShardCounts], None]]:
    """A bar over the bytes of a plan that runs in this process."""
    done: dict[int, int] = {}
    total = plan.totals.bytes_read + plan.totals.bytes_written
    with _progress() as progress:
        task = progress.add_task(f"{plan.method}: 0/{plan.totals.tensors} tensors", total=total)
        tensors: dict[int, int] = {}

        def on_progress(shard_index: int, counts: ShardCounts) -> None:
            done[shard_index] = counts.bytes_read + counts.bytes_written
            tensors[shard_index] = counts.tensors_solved
            progress.update(
                task,
                completed=sum(done.values()),
                description=f"{plan.method}: {sum(tensors.values())}/{plan.totals.tensors} tensors",
            )

        yield on_progress


def follow_job(client: Client, job_id: str) -> dict[str, Any]:
    """Show a job's progress from its event stream until it ends; returns the job."""
    job = client.job(job_id)
    with _progress() as progress:
        task = progress.add_task(str(job["state"]), total=None)
        for event in client.events(job_id):
            _show_event(progress, task, event)
    return client.job(job_id)


def _show_event(progress: Progress, task: TaskID, event: dict[str, Any]) -> None:
    data = event["data"]
    if event["type"] == "job.state_changed":
        progress.update(task, description=str(data.get("state", "")))
    elif event["type"] == "job.progress":
        counts = data.get("progress", data)
        progress.update(
            task,
            completed=counts["bytes_done"],
            total=counts["bytes_total"] or None,
            description=f"{counts['tensors_done']}/{counts['tensors_total']} tensors",
        )
    elif event["type"] in ("job.warning", "shard.retried"):
        progress.console.print(f"{event['type']}: {data.get('message') or data}", markup=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _show(table: Table) -> None:
    Console().print(table)


def print_plan(summary: dict[str, Any]) -> None:
    """A plan's summary: figures, then output files, then warnings."""
    table = _table("", "")
    for key, value in summary.items():
        if isinstance(value, int | float | str):
            table.add_row(
                key.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value}"
            )
    _show(table)
    for warning in summary.get("warnings", []):
        print(f"warning: {warning}")  # noqa: T201 - the command line's output


def print_methods(methods: Sequence[MergeMethod]) -> None:
    """One line a method; the one to start with is marked."""
    table = _table("method", "needs base", "touches", "rest", "what it does")
    for method in methods:
        name = f"{method.name} *" if method.recommended else method.name
        base = "yes" if method.needs_base else "no"
        table.add_row(name, base, method.default_touch, method.default_rest, method.summary)
    _show(table)


def print_method(method: MergeMethod) -> None:
    """One method in full."""
    console = Console()
    console.print(
        f"{method.name}: {method.title}\n\n{method.summary}\n\n{method.source}\n", markup=False
    )
    table = _table("parameter", "scope", "default", "meaning")
    for scope, model in (("merge", method.parameters), ("expert", method.expert_parameters)):
        for name, field in model.model_fields.items():
            default = "required" if field.is_required() else str(field.default)
            table.add_row(field.alias or name, scope, default, field.description or "")
    console.print(table)


def print_jobs(jobs: Sequence[dict[str, Any]]) -> None:
    """One line a job."""
    table = _table("id", "state", "method", "tensors", "created", "output")
    for job in jobs:
        progress = job["progress"]
        table.add_row(
            job["id"],
            job["state"],
            job["method"],
            f"{progress['tensors_done']}/{progress['tensors_total']}",
            job["created_at"],
            (job.get("output") or {}).get("uri") or job.get("output_uri") or "",
        )
    _show(table)
