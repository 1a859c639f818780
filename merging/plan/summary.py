"""What a plan would do, for people and for ``POST /v1/plans``: figures without the problems."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from merging.plan.plan import Plan
from merging.plan.timing import PlanEstimate


def plan_methods(plan: Plan) -> tuple[str, ...]:
    """Names of all methods: of the documents in the order of their steps, or of the variants; each
    once.
    """
    documents = plan.recipe.get("documents", ())
    names = [*(one["merge_method"] for one in documents), *(v.method for v in plan.variants)]
    return tuple(dict.fromkeys(names or [plan.method]))


def plan_summary(plan: Plan, estimate: PlanEstimate | None = None) -> dict[str, Any]:
    """The plan in figures, as a JSON object.

    Args:
        plan: Any plan.
        estimate: How long it should take; null in the summary if that is not known.
    """
    return {
        "object": "plan_summary",
        "plan_digest": plan.digest,
        "recipe_digest": plan.recipe_digest,
        "method": plan.method,
        "methods": list(plan_methods(plan)),
        "output_uri": plan.output_uri,
        "inputs": [{"uri": i.uri, "role": i.role, "digest": i.digest} for i in plan.inputs],
        "shards": len(plan.shards),
        "tensors": plan.totals.tensors,
        "tensors_by_method": _tensors_by_method(plan),
        "bytes_read": plan.totals.bytes_read,
        "bytes_written": plan.totals.bytes_written,
        "bytes_intermediate": plan.totals.bytes_intermediate,
        "flops": plan.totals.flops,
        "max_host_bytes": plan.totals.max_host_bytes,
        "max_device_bytes": plan.totals.max_device_bytes,
        "memory_budget": plan.memory_budget,
        "device_memory_budget": plan.device_memory_budget,
        "estimate": msgspec.to_builtins(estimate),
        "files": [
            {
                "name": shard.file_name,
                "kind": shard.kind,
                "size": shard.size,
                "tensors": len(shard.problems),
                "bytes_read": shard.bytes_read,
                "flops": shard.flops,
            }
            for shard in plan.shards
        ],
        "documents": [
            {"name": one.get("name"), "method": one["merge_method"]}
            for one in plan.recipe.get("documents", ())
        ],
        "variants": [
            {
                "name": variant.name,
                "method": variant.method,
                "uri": plan.checkpoint_uris[number],
                "recipe_digest": variant.recipe_digest,
                "tensors_by_method": _tensors_by_method(plan, number),
            }
            for number, variant in enumerate(plan.variants)
        ],
        "companions": [companion.file_name for companion in plan.companions],
        "warnings": list(plan.warnings),
    }


def _tensors_by_method(plan: Plan, number: int = 0) -> dict[str, int]:
    """How many tensors of the output each method makes, in one variant."""
    methods = Counter(
        plan.settings[problem.setting].of_variant(number).method
        for shard in plan.outputs
        for problem in shard.problems
    )
    return dict(sorted(methods.items()))
