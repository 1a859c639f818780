"""Making a plan on behalf of a request."""

from __future__ import annotations

import anyio.to_thread

from merging.plan.plan import Plan
from merging.plan.planner import make_plan
from merging.recipe import parse_recipe
from service.api.deps import Services
from service.api.schemas import PlanRequest


def with_defaults(services: Services, request: PlanRequest) -> PlanRequest:
    """The request with what the service's settings say where its options say nothing."""
    settings, options = services.settings, request.options
    defaults = {
        "workers": settings.workers_per_job,
        "statistics_uri": settings.statistics_uri,
    }
    missing = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    return request.model_copy(update={"options": options.model_copy(update=missing)})


async def plan_merge(services: Services, request: PlanRequest) -> Plan:
    """Check a recipe in full and plan it; reads headers only, writes nothing.

    Raises:
        MergeError: Everything that is wrong with the recipe, its inputs or its output. Pointers
            are into the recipe.
    """

    def plan() -> Plan:
        recipe = parse_recipe(request.recipe)
        output_uri = services.storage.normalise(request.output_uri)
        return make_plan(recipe, services.storage, request.options, output_uri)

    return await anyio.to_thread.run_sync(plan, limiter=services.planning)
