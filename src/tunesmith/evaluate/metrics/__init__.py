"""Metrics over predictions: `measure(predictions, names)` gives scores with intervals."""

from __future__ import annotations

from tunesmith.evaluate.metrics.base import MeasureOptions, Metric
from tunesmith.evaluate.metrics.measure import compare_predictions, measure, measure_rows
from tunesmith.evaluate.metrics.registry import METRICS

__all__ = [
    "METRICS",
    "MeasureOptions",
    "Metric",
    "compare_predictions",
    "measure",
    "measure_rows",
]
