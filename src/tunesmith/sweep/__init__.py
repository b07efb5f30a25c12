"""Sweeps: the search for the best values of a recipe, trial by trial."""
