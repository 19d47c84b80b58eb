"""Recipes: named choices of transformations, formats and solvers."""

from qcompile.recipes import builtin as _builtin  # noqa: F401  (registers the shipped recipes)
from qcompile.recipes.recipe import Override, Recipe, Step, get_recipe, list_recipes, register_recipe

__all__ = ["Override", "Recipe", "Step", "get_recipe", "list_recipes", "register_recipe"]
