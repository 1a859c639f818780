"""Jobs that are to run a plan which somebody has seen: that plan, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from merging.errors import MergeError
from merging.plan.plan import Plan


def check_pinned(plan: Plan, digest: str, inputs: Iterable[Mapping[str, Any]]) -> None:
    """Refuse a plan that is not the one with this digest.

    Planning is deterministic, so a plan made anew differs only if something that it stands on did.

    Args:
        plan: Made just now.
        digest: Of the plan that was seen.
        inputs: Of that plan, as ``{"uri", "digest"}``, to name what changed.

    Raises:
        MergeError: ``plan_outdated``.
    """
    if plan.digest == digest:
        return
    before = {(item["uri"], item["digest"]) for item in inputs}
    changed = [item.uri for item in plan.inputs if (item.uri, item.digest) not in before]
    reason = (
        f"since then these inputs have changed: {', '.join(changed)}"
        if changed
        else "the service plans the same recipe otherwise now"
    )
    raise MergeError(
        f"The merge is no longer the one that was planned: {reason}. Make a new plan.",
        code="plan_outdated",
    )
