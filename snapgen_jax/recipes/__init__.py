"""Recipes: one file is one training method. A module here named `x` with a class `RECIPE` is the recipe "x"."""
