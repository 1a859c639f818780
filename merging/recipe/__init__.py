"""Recipes: what users write, read safely and checked in full without touching storage."""

from merging.recipe.parse import parse_recipe, validate_recipe
from merging.recipe.recipe import ModelEntry, Module, Recipe, Slice, Sweep, Variant

__all__ = [
    "ModelEntry",
    "Module",
    "Recipe",
    "Slice",
    "Sweep",
    "Variant",
    "parse_recipe",
    "validate_recipe",
]
