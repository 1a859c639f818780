"""Making a plan on behalf of a request."""

from __future__ import annotations

from typing import Any

import anyio.to_thread

from merging.method import get_method
from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.recipe import Recipe, parse_recipe
from service.api.deps import Services
from service.api.schemas import PlanRequest


def with_defaults(services: Services, request: PlanRequest, recipe: Recipe) -> PlanRequest:
    """The request with what the service's settings say where its options say nothing."""
    settings, options = services.settings, request.options
    defaults: dict[str, Any] = {"workers": settings.workers_per_job}
    if any(get_method(name).keeps_statistics for name in recipe.methods):
        defaults["statistics_uri"] = settings.statistics_uri
    missing = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    return request.model_copy(update={"options": options.model_copy(update=missing)})


async def plan_merge(
    services: Services, request: PlanRequest, *, is_stored: bool = False
) -> tuple[PlanRequest, Plan]:
    """Check a recipe in full and plan it; reads headers only, writes nothing.

    Args:
        services: The service.
        request: What to plan.
        is_stored: It is that of a stored plan, with the service's defaults of then.

    Returns:
        The request with the service's defaults, and its plan.

    Raises:
        MergeError: Everything that is wrong with the recipe, its inputs or its output. Pointers
            are into the recipe, or begin with ``/options``.
    """

    def plan() -> tuple[PlanRequest, Plan]:
        recipe = parse_recipe(request.recipe)
        own = request if is_stored else with_defaults(services, request, recipe)
        output_uri = services.storage.normalise(own.output_uri)
        return own, make_plan(recipe, services.storage, own.options, output_uri)

    return await anyio.to_thread.run_sync(plan, limiter=services.planning)
