"""One plan for several documents: the results of all but the last are intermediate files.

Each document is planned as a merge by itself, in the order in which they need each other; to those
after it its result is a checkpoint whose headers are known (:mod:`merging.plan.made`). Then the
plans are joined: what would be another's output lies in the workspace, is read by the shards that
need it as soon as it is there, and goes when the last result is published.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import msgspec

from merging.errors import Fault, MergeError, RecipeError
from merging.method import get_method
from merging.options import MergeOptions
from merging.plan.made import MadeStorage
from merging.plan.packing import made_file
from merging.plan.plan import Plan, Problem, Shard, SourceFile
from merging.plan.stages import sum_up, with_files_at, without_idle_shards
from merging.recipe import Recipe
from merging.storage.base import Storage

PlanOne = Callable[[Recipe, Storage, MergeOptions, str], Plan]
"""Plans one document, as :func:`merging.plan.planner.make_plan`."""


def plan_documents(
    recipe: Recipe, storage: Storage, options: MergeOptions, output_uri: str, plan_one: PlanOne
) -> Plan:
    """Plan a recipe with documents; raises what planning one does, with pointers into these."""
    made = MadeStorage(storage)
    joined = _Joined(made)
    last = dataclasses.replace(recipe, documents=())
    for number, document in enumerate((*recipe.documents, last), 1):
        try:
            _refuse_masks(document)
            own = _options_of(document, recipe, options)
            plan = made.resolve(plan_one(document, made, own, output_uri))
            is_last = document is last
            joined.add(plan, document, "" if is_last else f"document-{number:02d}-")
        except MergeError as error:
            raise _within(document.pointer, error) from error
        if document.name is not None and not is_last:
            made.add(document.name, plan)
    return without_idle_shards(joined.plan(recipe), storage)


def _options_of(document: Recipe, recipe: Recipe, options: MergeOptions) -> MergeOptions:
    """The options of one document: statistics are kept of those that have some."""
    keeps = [name for name in recipe.methods if get_method(name).keeps_statistics]
    if not keeps or document.merge_method in keeps:
        return options
    return options.model_copy(update={"statistics_uri": None})


def _refuse_masks(document: Recipe) -> None:
    """Refuse methods whose masks only stand beside a checkpoint of models that last."""
    if get_method(document.merge_method).task_masks:
        detail = (
            f"{document.merge_method} publishes masks for models that are there when a task's model"
            " is made again. Merge it by itself."
        )
        fault = Fault("/merge_method", "incompatible_options", detail)
        raise RecipeError(detail, code="incompatible_options", faults=[fault])


def _within(pointer: str, error: MergeError) -> MergeError:
    """The error with its places as of the whole recipe; options stand beside it."""
    faults = [
        fault
        if fault.pointer.startswith("/options/")
        else dataclasses.replace(fault, pointer=pointer + fault.pointer)
        for fault in error.faults
    ]
    return type(error)(
        error.detail,
        code=error.code,
        faults=faults,
        retryable=error.retryable,
        context=error.context,
    )


class _Joined:
    """The plans so far, as one.

    Args:
        made: The storage that they were planned with.
    """

    def __init__(self, made: MadeStorage) -> None:
        self._made = made
        self._plans: list[Plan] = []
        self._shards: list[Shard] = []
        self._files: list[SourceFile] = []
        self._num_settings = 0
        self._makers: dict[str, Shard] = {}
        self._warnings: list[str] = []

    def add(self, plan: Plan, document: Recipe, prefix: str) -> None:
        """Add the plan of a document.

        Args:
            plan: With companions that lie in storage.
            document: Its recipe.
            prefix: Of the names of all its files, if it is not the last.
        """
        first_shard, first_file = len(self._shards), len(self._files)
        for file in plan.files:
            self._files.append(self._moved_file(file, plan, first_shard))
        for shard in plan.shards:
            moved = msgspec.structs.replace(
                shard,
                index=first_shard + shard.index,
                problems=tuple(self._moved(p, first_file) for p in shard.problems),
            )
            if prefix:
                name = shard.file_name if shard.folder else prefix + shard.file_name
                moved = msgspec.structs.replace(moved, file_name=name, kind="intermediate")
            self._shards.append(moved)
            if prefix and shard.is_output:
                self._makers[f"document:{document.name}/{shard.file_name}"] = moved
        where = f"{document.name}: " if document.name else ""
        self._warnings += [where + warning for warning in plan.warnings]
        self._num_settings += len(plan.settings)
        self._plans.append(plan)

    def plan(self, recipe: Recipe) -> Plan:
        """All of them; what is published is the last one's."""
        inputs = {
            item.uri: item
            for plan in self._plans
            for item in plan.inputs
            if not self._made.is_made(item.uri) or "+" in item.uri
        }
        return msgspec.structs.replace(
            self._plans[-1],
            recipe=recipe.normalised(),
            recipe_digest=recipe.digest,
            inputs=tuple(inputs.values()),
            files=tuple(self._files),
            settings=tuple(setting for plan in self._plans for setting in plan.settings),
            shards=tuple(self._shards),
            warnings=tuple(self._warnings),
            totals=sum_up(self._shards, self._made, self._plans[-1].output_uri),
        )

    def _moved_file(self, file: SourceFile, plan: Plan, first_shard: int) -> SourceFile:
        """A file, as one of the whole plan."""
        if file.shard is not None:
            return msgspec.structs.replace(file, shard=first_shard + file.shard)
        if file.uri in self._makers:
            return made_file(plan.output_uri, self._makers[file.uri])
        if not self._made.is_made(file.uri):
            return file
        companion = self._made.original(file.uri)
        if companion is None:
            detail = (
                f"{file.uri} is read before it is written: samples for a result of another document"
                " whose tokenizer is changed have to be tokens."
            )
            fault = Fault("/calibration", "incompatible_options", detail)
            raise RecipeError(detail, code="incompatible_options", faults=[fault])
        return SourceFile(companion.source_uri, file.size, companion.version)

    def _moved(self, problem: Problem, first_file: int) -> Problem:
        moved = with_files_at(problem, lambda number: number + first_file)
        return msgspec.structs.replace(moved, setting=problem.setting + self._num_settings)
