"""Recipes: read, checked, described to editors, and written with a few questions."""
