"""The merge report and the model card: what was merged, from what, how, and what it cost."""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from merging.method import get_method
from merging.plan.plan import Plan
from merging.receipts import Receipt

REPORT_NAME = "merge_report.json"
CARD_NAME = "README.md"


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
    weights.

    Args:
        plan: The plan.
        receipts: One per shard, in shard order.
    """
    digest = hashlib.sha256()
    for receipt in receipts:
        digest.update(f"{receipt.file_name} {receipt.sha256}\n".encode())
    planned = {p.tensor_name: p for shard in plan.shards for p in shard.problems}
    stages = Counter[str]()
    for receipt in receipts:
        stages.update(receipt.seconds)
    return {
        "object": "merge_report",
        "recipe": plan.recipe,
        "recipe_digest": plan.recipe_digest,
        "plan_digest": plan.digest,
        "method": plan.method,
        "seed": plan.seed,
        "inputs": [
            {"uri": item.uri, "role": item.role, "digest": item.digest} for item in plan.inputs
        ],
        "output": {
            "uri": plan.output_uri,
            "digest": f"sha256:{digest.hexdigest()}",
            "bytes": sum(receipt.size for receipt in receipts),
            "files": [{"name": r.file_name, "size": r.size, "sha256": r.sha256} for r in receipts],
        },
        "bytes_read": sum(receipt.bytes_read for receipt in receipts),
        "read_requests": sum(receipt.read_requests for receipt in receipts),
        "flops_planned": plan.totals.flops,
        "seconds": {stage: round(seconds, 3) for stage, seconds in stages.items()},
        "peak_buffer_bytes": max((r.peak_buffer_bytes for r in receipts), default=0),
        "devices": sorted({receipt.device for receipt in receipts}),
        "workers": sorted({receipt.worker for receipt in receipts}),
        "warnings": list(plan.warnings),
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
                **figure.figures,
            }
            for receipt in receipts
            for figure in receipt.problems
        ],
    }


def model_card(plan: Plan, report: dict[str, Any]) -> str:
    """The model card: front matter that hubs read, lineage, and the full recipe."""
    method = get_method(plan.method)
    bases = [item.uri for item in plan.inputs if item.role == "base"]
    experts = [item.uri for item in plan.inputs if item.role == "expert"]
    front = {
        "library_name": "transformers",
        "base_model": [*bases, *experts],
        "base_model_relation": "merge",
        "tags": ["merge", "mergeyard", plan.method],
    }
    lineage = "\n".join(
        f"| {item.role} | `{item.uri}` | `{item.digest[:23]}…` |" for item in plan.inputs
    )
    recipe = yaml.safe_dump(plan.recipe, sort_keys=False, allow_unicode=True)
    name = plan.output_uri.rstrip("/").rsplit("/", 1)[-1]
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# {name}

A merge of {len(experts)} models by **{method.title}**, made with Mergeyard without further
training.

{method.summary}

Source: {method.source}

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
