"""Recipes: reading, checking, and filling in what a user left open."""
