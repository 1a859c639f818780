"""One task's own model, made again of a shared checkpoint, the task's mask, and the base model.

That is a merge of its own: planned from headers, streamed shard by shard within a memory budget,
with receipts, resume, and an index that appears last (:func:`merging.local_run.run_plan`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from merging.checkpoint.header import HeaderEntry, read_header
from merging.checkpoint.index import WeightFile, read_checkpoint_index
from merging.dtypes import BITS
from merging.errors import CheckpointError, RecipeError
from merging.method import OWN, get_method
from merging.options import MergeOptions
from merging.plan.cost import Budgets, problem_cost, problem_load, with_cost
from merging.plan.outputs import Companion
from merging.plan.plan import COPY, Plan, Problem, Setting, Source, SourceFile
from merging.plan.planner import make_plan
from merging.plan.stages import sum_up
from merging.publish import read_report
from merging.recipe import parse_recipe
from merging.report import REPORT_NAME
from merging.storage.base import Storage
from merging.task_masks import FILE_PREFIX, REPORT_KEY, TENSOR_SUFFIX, MaskedTask

_MASK_FILE = re.compile(rf"{FILE_PREFIX}-\d+-of-\d+\.safetensors")


class _Input(msgspec.Struct):
    uri: str
    role: str
    digest: str


class _File(msgspec.Struct):
    name: str


class _Output(msgspec.Struct):
    files: tuple[_File, ...]


class _Report(msgspec.Struct):
    method: str
    inputs: tuple[_Input, ...]
    output: _Output
    task_masks: tuple[MaskedTask, ...]


class _Mask(msgspec.Struct, frozen=True):
    """Where the masks of a tensor are: the number of the file, and the tensor in it."""

    file: int
    entry: HeaderEntry


def plan_rebuild(
    checkpoint_uri: str,
    task: str,
    storage: Storage,
    options: MergeOptions,
    output_uri: str,
    *,
    base_uri: str | None = None,
) -> Plan:
    """Plan the making of one task's model. Reads the report and headers, never weights.

    Args:
        checkpoint_uri: The shared checkpoint, with masks and merge report beside its weights.
        task: Address of the task's expert as the report has it, or its number, from 1.
        storage: Where all that is.
        options: How to run it.
        output_uri: Folder of the task's model.
        base_uri: The base model, if it is no longer where it was merged from.

    Raises:
        RecipeError: ``bad_parameter``: there is no such task.
        PlanError: As planning a merge.
        CheckpointError: ``index_inconsistent``: the report tells of no masks, or not of these;
            ``shape_mismatch``: masks are not those of the weights;
            ``digest_mismatch``: the base model is another one than it was.
        StorageError: Something cannot be read.
    """
    shared = storage.normalise(checkpoint_uri)
    report = _read_tasks(shared, storage)
    number = _find_task(report, task, shared)
    found = report.task_masks[number]
    base = next(item for item in report.inputs if item.role == "base")
    document: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": base_uri or base.uri,
        "models": [{"model": shared}],
        "parameters": {"lambda": found.rescaler},
    }
    plan = make_plan(parse_recipe(document), storage, options, output_uri)
    if base_uri is None and plan.inputs[0].digest != base.digest:
        raise CheckpointError(
            f"The base model {base.uri} was changed since {shared} was merged. Give the one that it"
            " was merged from (--base).",
            code="digest_mismatch",
            context={"uri": base.uri},
        )
    plan = _by_masks(plan, report, number, shared, storage)
    index = read_checkpoint_index(storage, shared)
    companions = index.companions.items()
    named = {key: value for key, value in index.config.items() if key == "architectures"}
    return msgspec.structs.replace(
        plan,
        config={**plan.config, **named},  # a recipe may have told another class than the base's
        companions=tuple(Companion(f"{shared}/{n}", n, version) for n, version in companions),
        recipe={**document, "merge_method": report.method, "task": found.model},
        method=report.method,
    )


def _by_masks(plan: Plan, report: _Report, number: int, shared: str, storage: Storage) -> Plan:
    """The plan with each tensor made by the task's mask, in place of the whole update."""
    masks, files = _read_masks(shared, report, storage, first=len(plan.files))
    tasks = report.task_masks
    own = Setting(report.method, {"lambda": tasks[number].rescaler}, step=OWN)
    budgets = Budgets(plan.memory_budget, plan.device_memory_budget)
    method = get_method(report.method)
    parameters = method.parameters.model_validate(own.parameters)

    def rebuilt(problem: Problem) -> Problem:
        if not problem.experts:
            return problem
        changed = _rebuilt(problem, plan, masks, number, len(tasks))
        step = method.step(OWN) if changed.experts else None
        return with_cost(
            changed, problem_cost([(step, parameters)], problem_load(changed), budgets)
        )

    shards = tuple(
        msgspec.structs.replace(shard, problems=tuple(map(rebuilt, shard.problems)))
        for shard in plan.shards
    )
    if not masks:
        raise _inconsistent(shared, "it names no files of masks")
    unknown = masks.keys() - {p.tensor_name for shard in shards for p in shard.problems}
    if unknown:
        raise _inconsistent(shared, f"there are masks of {min(unknown)!r}, no tensor of it")
    return msgspec.structs.replace(
        plan,
        files=(*plan.files, *files),
        settings=(*plan.settings, own, Setting(COPY)),
        shards=shards,
        totals=sum_up(shards, storage, plan.output_uri),
    )


def _rebuilt(
    problem: Problem, plan: Plan, masks: Mapping[str, _Mask], number: int, num_tasks: int
) -> Problem:
    """A tensor of the task's model: by its mask, or the shared one where it has none."""
    mask = masks.get(problem.tensor_name)
    if mask is None:
        [shared] = problem.experts
        return msgspec.structs.replace(
            problem, base=shared, experts=(), sees_base=False, setting=len(plan.settings) + 1
        )
    row = -(-problem.num_entries // 8)
    if mask.entry.dtype != "U8" or mask.entry.shape != (num_tasks, row):
        raise CheckpointError(
            f"{mask.entry.name!r} is {mask.entry.dtype} {list(mask.entry.shape)}; the masks of"
            f" {num_tasks} tasks for {problem.num_entries} entries are U8 {[num_tasks, row]}. Copy"
            " weights, masks and report from the same merge.",
            code="shape_mismatch",
            context={"tensor_name": mask.entry.name},
        )
    start = mask.entry.start + number * row
    bits = Source(mask.file, start, start + row, BITS)
    return msgspec.structs.replace(
        problem, experts=(*problem.experts, bits), setting=len(plan.settings)
    )


def _read_tasks(shared: str, storage: Storage) -> _Report:
    found = read_report(storage, shared)
    if REPORT_KEY not in found:
        raise _inconsistent(shared, "it tells of no tasks' masks: only a merge by emr has some")
    try:
        report = msgspec.convert(found, _Report)
    except msgspec.ValidationError as error:
        raise _inconsistent(shared, str(error)) from error
    if not any(item.role == "base" for item in report.inputs):
        raise _inconsistent(shared, "it names no base model")
    if not get_method(report.method).task_masks:
        raise _inconsistent(shared, f"a merge by {report.method} has no tasks' masks")
    return report


def _find_task(report: _Report, task: str, shared: str) -> int:
    models = [one.model for one in report.task_masks]
    names = [*models, *map(str, range(1, len(models) + 1))]
    if models.count(task) > 1 or task not in names:
        known = ", ".join(f"{number} ({model})" for number, model in enumerate(models, 1))
        raise RecipeError(
            f"task: {shared} has no task {task!r}, or several of that name. Its tasks: {known}.",
            code="bad_parameter",
            context={"uri": shared, "expected": models},
        )
    return names.index(task) % len(models)


def _read_masks(
    shared: str, report: _Report, storage: Storage, *, first: int
) -> tuple[dict[str, _Mask], list[SourceFile]]:
    """Masks by the name of their tensor, and their files, which are numbered from ``first``."""
    masks: dict[str, _Mask] = {}
    files: list[SourceFile] = []
    for name in (file.name for file in report.output.files if _MASK_FILE.fullmatch(file.name)):
        stat = storage.stat(f"{shared}/{name}")
        header = read_header(storage, WeightFile(stat.uri, stat.size, stat.version))
        for entry in header.entries:
            masks[entry.name.removesuffix(TENSOR_SUFFIX)] = _Mask(first + len(files), entry)
        files.append(SourceFile(stat.uri, stat.size, stat.version))
    return masks, files


def _inconsistent(shared: str, what: str) -> CheckpointError:
    uri = f"{shared}/{REPORT_NAME}"
    return CheckpointError(
        f"{uri} does not let a task's model be made again: {what}.",
        code="index_inconsistent",
        context={"uri": uri},
    )
