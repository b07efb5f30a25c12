"""Measuring and showing what a run did."""
