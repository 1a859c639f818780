"""Recipes: what users write, read safely and checked in full without touching storage."""

from merging.recipe.parse import parse_recipe, validate_recipe
from merging.recipe.recipe import ModelEntry, Recipe

__all__ = ["ModelEntry", "Recipe", "parse_recipe", "validate_recipe"]
