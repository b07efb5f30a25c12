"""Which metrics fit a data set: by its prompts and labels, never by what models answered."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.evaluate.metrics.base import MeasureOptions
from tunesmith.evaluate.metrics.correction import source_rule
from tunesmith.evaluate.metrics.structured import is_json
from tunesmith.evaluate.metrics.text import normalize
from tunesmith.evaluate.prediction import Prediction

MOST_LABELS = 50
ROWS_EACH = 3
"""Labels are classes if each stands for 3 rows on average, as `openai tools prepare_data` says."""

LABEL_CHARACTERS = 40

MOST = 0.9
"""Of the labels have to be JSON."""

ALWAYS = ("stop_rate", "repeat_rate", "lengths")


def fitting_metrics(predictions: Sequence[Prediction], options: MeasureOptions) -> list[str]:
    """Names of metrics for these rows."""
    labels = [each.label for each in predictions if each.label is not None]
    if not labels:
        return list(ALWAYS)
    if are_classes(labels):
        return ["classification", "exact_match", *ALWAYS]
    if sum(map(is_json, labels)) >= MOST * len(labels):
        return ["json", "exact_match", *ALWAYS]
    if source_rule(predictions, options) is not None:
        return ["correction", "exact_match", "bleu", "edits", *ALWAYS]
    return ["bleu", "chrf", "rouge", "exact_match", "edits", *ALWAYS]


def are_classes(labels: Sequence[str]) -> bool:
    """Whether the labels are a short closed set: few, short, and each of them often."""
    distinct = {normalize(label).casefold() for label in labels}
    is_closed = 2 <= len(distinct) <= min(MOST_LABELS, len(labels) / ROWS_EACH)
    return is_closed and all(len(label) <= LABEL_CHARACTERS for label in distinct)
