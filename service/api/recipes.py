"""Checking recipes while they are written."""

from __future__ import annotations

from fastapi import APIRouter

from merging.recipe import validate_recipe
from service.api.deps import guarded
from service.api.objects import FaultObject, RecipeValidation
from service.api.schemas import RecipeDocument
from service.auth import Scope

router = APIRouter(prefix="/v1/recipes", tags=["recipes"])


@router.post("/validate", operation_id="recipes.validate", **guarded(Scope.JOBS_READ))
def validate(body: RecipeDocument) -> RecipeValidation:
    """Check form, method, parameters and selectors. Storage is not looked at."""
    recipe, faults = validate_recipe(body.recipe)
    return RecipeValidation(
        is_valid=recipe is not None,
        errors=[FaultObject(**fault.to_dict()) for fault in faults],
        warnings=list(recipe.warnings) if recipe else [],
        method=recipe.merge_method if recipe else None,
        methods=list(recipe.methods) if recipe else [],
        recipe=recipe.normalised() if recipe else None,
        recipe_digest=recipe.digest if recipe else None,
    )
