"""The merge report and the model card: what was merged, from what, how, and what it cost."""

from __future__ import annotations

import hashlib
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from statistics import fmean
from typing import Any

import msgspec
import yaml

from merging.method import get_method
from merging.plan.plan import Plan, Problem
from merging.plan.summary import plan_methods
from merging.plan.timing import shard_seconds
from merging.plan.wording import shorten_list
from merging.receipts import ProblemFigures, Receipt, describe_statistics
from merging.task_masks import REPORT_KEY, describe_tasks

REPORT_NAME = "merge_report.json"
SWEEP_REPORT_NAME = "sweep_report.json"
CARD_NAME = "README.md"

_HUB_SNAPSHOT = re.compile(r"/models--([\w.-]+)/snapshots/[\w.-]+/?$")
_NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")


def engine_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    versions = {"python": platform.python_version()}
    for package in ("mergeyard", "torch", "numpy", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def build_report(plan: Plan, receipts: Sequence[Receipt]) -> dict[str, Any]:
    """The merge report as a JSON object.

    The output's ``digest`` covers names and SHA-256 of all weight files: equal digests mean equal
    weights. ``seconds`` are sums over shards as the solving threads saw them (``fetch`` and
    ``write``: waiting), ``busy_seconds`` those in which bytes moved beside the solving, and
    ``estimate`` what the workers' rates let expect of both; null if nothing was known.

    The report of a sweep has no ``tensors`` of its own, but in ``variants`` the reports of all
    variants, each as of a merge by itself. Bytes, memory and time in these are those of the whole
    sweep, which its variants share.

    Args:
        plan: The plan.
        receipts: In shard order.
    """
    work = _work(plan, receipts)
    reports = [
        _merge_report(merge, [receipt.of_variant(number) for receipt in receipts], work)
        for number, merge in enumerate(plan.merges())
    ]
    if not plan.variants:
        return reports[0]
    for report, variant in zip(reports, plan.variants, strict=True):
        report["variant"] = variant.name
    return {
        "object": "sweep_report",
        **_lineage(plan),
        "output": _sweep_output(plan, reports),
        **work,
        "warnings": [
            *plan.warnings,
            *(
                f"{report['variant']}: {text}"
                for report in reports
                for text in report["warnings"][len(plan.warnings) :]
            ),
        ],
        "totals": {
            name: sum(report["totals"][name] for report in reports)
            for name in ("tensors", "flops", "layers_solved")
        }
        | {"interference_removed": None},
        "versions": engine_versions(),
        "tensors": [],
        "variants": reports,
    }


def _lineage(plan: Plan) -> dict[str, Any]:
    return {
        "recipe": plan.recipe,
        "recipe_digest": plan.recipe_digest,
        "method": plan.method,
        "methods": list(plan_methods(plan)),
        "seed": plan.seed,
        "inputs": [
            {"uri": item.uri, "role": item.role, "digest": item.digest} for item in plan.inputs
        ],
    }


def _work(plan: Plan, receipts: Sequence[Receipt]) -> dict[str, Any]:
    """What was done, and what it took."""
    intermediate = [r for r in receipts if not plan.shards[r.shard_index].is_output]
    return {
        "plan_digest": plan.digest,
        "bytes_read": sum(receipt.bytes_read for receipt in receipts),
        "read_requests": sum(receipt.read_requests for receipt in receipts),
        "bytes_intermediate": sum(receipt.bytes_written for receipt in intermediate),
        "flops_planned": plan.totals.flops,
        "seconds": _sum_seconds(receipt.seconds for receipt in receipts),
        "busy_seconds": _sum_seconds(receipt.busy_seconds for receipt in receipts),
        "estimate": _estimate(plan, receipts),
        "peak_buffer_bytes": max((r.peak_buffer_bytes for r in receipts), default=0),
        "statistics": describe_statistics(intermediate),
        "devices": sorted({receipt.device for receipt in receipts}),
        "workers": sorted({receipt.worker for receipt in receipts}),
    }


def _merge_report(
    plan: Plan, receipts: Sequence[Receipt], work: Mapping[str, Any]
) -> dict[str, Any]:
    """The report of a merge by itself, or of one variant."""
    digest = hashlib.sha256()
    written = [receipt for receipt in receipts if plan.shards[receipt.shard_index].is_output]
    for receipt in written:
        digest.update(f"{receipt.file_name} {receipt.sha256}\n".encode())
    planned = {p.tensor_name: p for shard in plan.outputs for p in shard.problems}
    tensors = _tensors(plan, receipts)
    return {
        "object": "merge_report",
        **_lineage(plan),
        "output": {
            "uri": plan.output_uri,
            "digest": f"sha256:{digest.hexdigest()}",
            "bytes": sum(receipt.size for receipt in written),
            "files": [{"name": r.file_name, "size": r.size, "sha256": r.sha256} for r in written],
        },
        **_tasks(plan, tensors),
        **work,
        "totals": _totals(tensors, planned),
        "warnings": [*plan.warnings, *_warnings_of_tensors(tensors)],
        "versions": engine_versions(),
        "tensors": [
            {
                "name": figure.tensor_name,
                "shape": list(planned[figure.tensor_name].shape),
                "dtype": planned[figure.tensor_name].dtype,
                "role": planned[figure.tensor_name].role,
                "layer": planned[figure.tensor_name].layer,
                "method": figure.method,
                "seconds": figure.solve_seconds,
                **_source_names(planned[figure.tensor_name]),
                **figure.figures,
            }
            for figure in tensors
        ],
    }


def _tasks(plan: Plan, tensors: Sequence[ProblemFigures]) -> dict[str, Any]:
    """The tasks whose masks are published, if any are."""
    masks = {
        p.tensor_name for shard in plan.shards if shard.kind == "masks" for p in shard.problems
    }
    if not masks:
        return {}
    models = [item.uri for item in plan.inputs if item.role == "expert"]
    figures = [tensor.figures for tensor in tensors if tensor.tensor_name in masks]
    return {REPORT_KEY: describe_tasks(models, figures)}


def _source_names(problem: Problem) -> dict[str, list[str]]:
    """The tensor's names in the models, base first, where one has another: layers of slices."""
    if not any(source.name for source in problem.sources):
        return {}
    return {"source_names": [source.name or problem.tensor_name for source in problem.sources]}


def _sweep_output(plan: Plan, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a sweep published, as ``output`` of its report: all of it, and each variant's."""
    outputs = [
        {"name": variant.name, "method": variant.method, **report["output"]}
        for variant, report in zip(plan.variants, reports, strict=True)
    ]
    digest = hashlib.sha256()
    for output in outputs:
        digest.update(f"{output['name']} {output['digest']}\n".encode())
    return {
        "uri": plan.output_uri,
        "digest": f"sha256:{digest.hexdigest()}",
        "bytes": sum(output["bytes"] for output in outputs),
        "files": [
            {**file, "name": f"{output['name']}/{file['name']}"}
            for output in outputs
            for file in output["files"]
        ],
        "variants": outputs,
    }


def _tensors(plan: Plan, receipts: Sequence[Receipt]) -> list[ProblemFigures]:
    """Figures of the output's tensors, with those of the intermediate work that was for them."""
    early: dict[str, list[ProblemFigures]] = {}
    tensors = []
    for receipt in receipts:
        for found in receipt.problems:
            if not plan.shards[receipt.shard_index].is_output:
                early.setdefault(found.tensor_name, []).append(found)
                continue
            parts = [*early.get(found.tensor_name, ()), found]
            tensors.append(
                ProblemFigures(
                    tensor_name=found.tensor_name,
                    method=found.method,
                    solve_seconds=sum(part.solve_seconds for part in parts),
                    figures={name: v for part in parts for name, v in part.figures.items()},
                )
            )
    return tensors


def _totals(figures: Sequence[ProblemFigures], planned: Mapping[str, Problem]) -> dict[str, Any]:
    """Sums over what was done, and the mean of what solving layers gained."""
    removed = [
        figure.figures["interference_removed"]
        for figure in figures
        if "interference_removed" in figure.figures
    ]
    return {
        "tensors": len(figures),
        "flops": sum(
            figure.figures.get("flops", planned[figure.tensor_name].flops) for figure in figures
        ),
        "layers_solved": len(removed),
        "interference_removed": fmean(removed) if removed else None,
    }


def _sum_seconds(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    stages = Counter[str]()
    for part in parts:
        stages.update(part)
    return {stage: round(seconds, 3) for stage, seconds in stages.items()}


def _estimate(plan: Plan, receipts: Sequence[Receipt]) -> dict[str, float] | None:
    """What the rates that each worker knew when it began let expect of its shard, summed up."""
    found = []
    for receipt in receipts:
        shard = plan.shards[receipt.shard_index]
        stages = shard_seconds(plan, shard, receipt.rates) if receipt.rates else None
        if stages is None:
            return None
        found.append(msgspec.to_builtins(stages))
    return _sum_seconds(found)


def _warnings_of_tensors(tensors: Sequence[ProblemFigures]) -> list[str]:
    """What methods warned of, each kind once: texts that differ in their figures are one kind."""
    kinds: dict[str, tuple[str, list[str]]] = {}
    for figure in tensors:
        for text in figure.figures.get("warnings", ()):
            _, names = kinds.setdefault(_NUMBER.sub("#", text), (text, []))
            names.append(figure.tensor_name)
    return [
        f"{names[0]}: {text}"
        if len(names) == 1
        else f"{len(names)} tensors ({shorten_list(names)}), with figures of the first: {text}"
        for text, names in kinds.values()
    ]


def hub_name(uri: str) -> str | None:
    """The Hub's name of a model that lies in a cache of the Hub, as in ``org/model``.

    The Hub shows parentage between its own models, and refuses a card that names others there.
    """
    match = _HUB_SNAPSHOT.search(uri)
    return None if match is None else match.group(1).replace("--", "/", 1)


def model_card(plan: Plan, report: dict[str, Any]) -> str:
    """The model card: front matter that hubs read, lineage, and the full recipe."""
    methods = [get_method(name) for name in plan_methods(plan)]
    num_experts = sum(item.role == "expert" for item in plan.inputs)
    is_adapter = plan.adapter_config is not None
    front: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers"}
    if any(name.endswith("ForCausalLM") for name in plan.config.get("architectures") or ()):
        front["pipeline_tag"] = "text-generation"
    front["tags"] = ["merge", "mergeyard", *(method.name for method in methods)]
    models = [item.uri for item in plan.inputs if item.role == "base" or not is_adapter]
    parents = [name for uri in models if (name := hub_name(uri)) is not None]
    if parents:
        relation = "adapter" if is_adapter else "merge"
        front |= {"base_model": parents, "base_model_relation": relation}
    lineage = "\n".join(
        f"| {item.role} | `{item.uri}` | `{item.digest[:23]}…` |" for item in plan.inputs
    )
    recipe = yaml.safe_dump(plan.recipe, sort_keys=False, allow_unicode=True)
    name = plan.output_uri.rstrip("/").rsplit("/", 1)[-1]
    titles = ", then ".join(f"**{method.title}**" for method in methods)
    told = "\n\n".join(f"{method.summary}\n\nSource: {method.source}" for method in methods)
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# {name}

A merge of {num_experts} models by {titles}, made with Mergeyard without further
training.

{told}

## Inputs

| role | model | digest |
|---|---|---|
{lineage}

## Recipe

```yaml
{recipe}```

Recipe digest `{plan.recipe_digest}`, output digest `{report["output"]["digest"]}`. Figures for
every tensor are in `{REPORT_NAME}`.
"""
