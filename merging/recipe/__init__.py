"""Recipes: what users write, read safely and checked in full without touching storage."""

from merging.recipe.parse import parse_recipe, validate_recipe
from merging.recipe.recipe import ModelEntry, Recipe, Sweep, Variant

__all__ = ["ModelEntry", "Recipe", "Sweep", "Variant", "parse_recipe", "validate_recipe"]
