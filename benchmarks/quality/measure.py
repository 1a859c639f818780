"""Merges through the engine's own path, and what they are worth on every task."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.quality.encoder import Classifier
from benchmarks.quality.experts import Experts
from benchmarks.quality.recipes import CALIBRATION_SAMPLES, TUNED, Source, recipe
from benchmarks.quality.tasks import Task
from merging.errors import MergeError
from merging.local_run import run_plan
from merging.method import MergeMethod
from merging.options import MergeOptions
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from merging.storage.router import open_storage

Accuracies = Mapping[str, float]
"""Share of right answers, by task."""


@dataclass(frozen=True)
class Merged:
    """A merge that was done: where, the weights' digest, CPU seconds, bytes read."""

    folder: Path
    digest: str
    cpu_seconds: float
    bytes_read: int


class Bench:
    """One set of experts, and merges of them.

    Args:
        tasks: What they are for.
        experts: They and their heads.
        cache: Keeps the accuracies of weights that were judged before.
        scratch: For one merged checkpoint at a time.

    Attributes:
        base: Accuracies of the pretrained encoder with the tasks' heads.
        probe: Of the pretrained encoder with heads that are trained on its vectors.
        experts: Of each expert on its own task.
    """

    def __init__(self, tasks: Sequence[Task], experts: Experts, cache: Path, scratch: Path) -> None:
        self._tasks = tasks
        self._cache = cache
        self._scratch = scratch
        self._pretrained = experts.base
        self._sources = [Source(experts.folder(task), experts.samples(task)) for task in tasks]
        self._heads = {task.name: experts.head(task) for task in tasks}
        self.base = self._remember("base", lambda: self._judge(experts.base, "test"))
        self.probe = self._remember("probe", self._probe)
        own = " ".join(str(source.folder) for source in self._sources)
        self.experts = self._remember(f"experts {own}", self._own)

    def kept(self, accuracies: Accuracies) -> float:
        """Mean over tasks of the accuracy divided by the expert's, in per cent."""
        return 100 * fmean(accuracies[task] / self.experts[task] for task in self.experts)

    def measure(self, method: MergeMethod) -> dict[str, Any]:
        """The figures of a method, or why it has none."""
        try:
            merged = self._merge(method, {})
        except MergeError as error:
            return {"excluded": self._reason(error)}
        row = self._quality(merged) | {
            "cpu_seconds": merged.cpu_seconds,
            "bytes_read": merged.bytes_read,
            "samples": CALIBRATION_SAMPLES * len(self._tasks) if method.calibrated else 0,
        }
        if method.name in TUNED:
            row["tuned"] = self._tuned(method)
        return row

    def _tuned(self, method: MergeMethod) -> dict[str, Any]:
        """The method as its paper sets it, with the value that is best on validation."""
        tuned = TUNED[method.name]
        tried: dict[float, float] = {}
        best: dict[str, Any] = {}
        for value in tuned.values:
            parameters = {**tuned.settings, tuned.key: value}
            merged = self._merge(method, parameters)
            validation = fmean(self._accuracies(merged, "validation").values())
            if validation > max(tried.values(), default=-1.0):
                best = {"parameters": parameters} | self._quality(merged)
            tried[value] = validation
        return best | {"validation": tried}

    def _quality(self, merged: Merged) -> dict[str, Any]:
        accuracies = self._accuracies(merged, "test")
        return {"kept": self.kept(accuracies), "accuracies": accuracies}

    def _accuracies(self, merged: Merged, part: str) -> Accuracies:
        return self._remember(f"{merged.digest} {part}", lambda: self._judge(merged.folder, part))

    def _judge(self, folder: Path, part: str) -> Accuracies:
        """A checkpoint on a part of every task."""
        classifier = Classifier(folder)
        return {
            task.name: classifier.accuracy(self._heads[task.name], task, part)
            for task in self._tasks
        }

    def _own(self) -> Accuracies:
        """Every expert on its own task."""
        return {
            task.name: Classifier(source.folder).accuracy(self._heads[task.name], task, "test")
            for task, source in zip(self._tasks, self._sources, strict=True)
        }

    def _probe(self) -> Accuracies:
        classifier = Classifier(self._pretrained)
        return {
            task.name: classifier.accuracy(classifier.linear_probe(task), task, "test")
            for task in self._tasks
        }

    def _remember(self, what: str, judge: Callable[[], Accuracies]) -> Accuracies:
        """Accuracies of what was judged before on these tasks, or of what is judged now."""
        key = f"{what} {[task.digest for task in self._tasks]}"
        path = self._cache / "accuracies" / hashlib.sha256(key.encode()).hexdigest()[:24]
        if not path.exists():
            judged = judge()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(judged), encoding="utf-8")
        known: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return known

    def _merge(self, method: MergeMethod, parameters: dict[str, float]) -> Merged:
        output = self._scratch / "merged"
        shutil.rmtree(output, ignore_errors=True)
        document = recipe(method, self._pretrained, self._sources, parameters)
        begin = time.process_time()
        storage = open_storage()
        plan = make_plan(parse_recipe(json.dumps(document)), storage, MergeOptions(), str(output))
        report = run_plan(plan, storage)
        seconds = time.process_time() - begin
        return Merged(output, report["output"]["digest"], seconds, report["bytes_read"])

    def _reason(self, error: MergeError) -> str:
        """Why the planner refuses, without the places of this machine."""
        reason = error.faults[0].detail if error.faults else error.detail
        for source in self._sources:
            reason = reason.replace(str(source.folder.absolute()), "an expert")
        return reason
