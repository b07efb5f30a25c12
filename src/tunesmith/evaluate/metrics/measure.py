"""Measures predictions by the metrics named, or by those that fit the data."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from tunesmith.errors import EvaluationError, UserError
from tunesmith.evaluate.intervals import Measured, compare
from tunesmith.evaluate.metrics.auto import fitting_metrics
from tunesmith.evaluate.metrics.base import MeasureOptions, Metric
from tunesmith.evaluate.metrics.registry import METRICS
from tunesmith.evaluate.metrics.text import without_thinking
from tunesmith.evaluate.prediction import Prediction
from tunesmith.evaluate.scores import Comparison, Score

Names = Sequence[str] | Literal["auto"]


def measure(
    predictions: Sequence[Prediction], names: Names = "auto", options: MeasureOptions | None = None
) -> list[Score]:
    """Scores of the predictions, with 95 % intervals, in the order of the names.

    Args:
        predictions: rows without a label count for those metrics only that need none; thinking in
            front of an answer counts for its length and its end alone.
        names: of entries of `METRICS`, or of single figures of theirs; `auto`: those that fit.
        options: what can be set.

    Raises:
        UserError: a metric is unknown, needs a library that is not there, or cannot be found of
            these predictions (`evaluate.*`).
    """
    options = options or MeasureOptions()
    return [
        each.score(resamples=options.resamples, seed=options.seed)
        for each in measure_rows(predictions, names, options)
    ]


def measure_rows(
    predictions: Sequence[Prediction], names: Names = "auto", options: MeasureOptions | None = None
) -> list[Measured]:
    """As `measure`, in the form that `intervals.compare` takes.

    A figure that has no value on these rows, such as AUROC with one class alone, is left out, and
    the reporter told.
    """
    options = options or MeasureOptions()
    if not predictions:
        raise EvaluationError(
            "evaluate.no-rows", "predictions", found="none", expected="at least one prediction"
        )
    names = fitting_metrics(predictions, options) if isinstance(names, str) else names
    spoken = [replace(each, prediction=without_thinking(each.prediction)) for each in predictions]
    found: dict[str, Measured] = {}
    for metric, wanted in _chosen(names):
        if metric.needs == "labels" and all(each.label is None for each in predictions):
            raise UserError(
                "evaluate.no-labels",
                f"metric {metric.name}",
                found="predictions of rows that have no label",
                expected="rows with an answer of their own to compare with",
            )
        rows = predictions if metric.reads_thinking else spoken
        figures = [each for each in metric.measure(rows, options) if wanted in (None, each.name)]
        for each in figures:
            if math.isnan(each.value):
                options.reporter.note(f"{each.name}: these rows give it no value; left out")
            else:
                found[each.name] = each
    return list(found.values())


def compare_predictions(
    before: Sequence[Prediction],
    after: Sequence[Prediction],
    names: Names = "auto",
    options: MeasureOptions | None = None,
) -> tuple[list[Score], list[Score], list[Comparison]]:
    """Scores of two models and what can be said about the difference, on the rows of both.

    Figures without a direction (lengths) are scored but not compared.

    Raises:
        EvaluationError: the two have no row in common (`evaluate.unpaired`).
        UserError: as `measure`.
    """
    options = options or MeasureOptions()
    first, second = common_rows(before, after)
    # What fits is chosen once, or an answer's shape would decide what it is measured by.
    names = fitting_metrics(first, options) if isinstance(names, str) else names
    sides = [measure_rows(rows, names, options) for rows in (first, second)]
    scores = [
        [each.score(resamples=options.resamples, seed=options.seed) for each in side]
        for side in sides
    ]
    by_name = {each.name: each for each in sides[1]}
    comparisons = [
        compare(each, by_name[each.name], resamples=options.resamples, seed=options.seed)
        for each in sides[0]
        if each.better != "neither" and each.name in by_name
    ]
    return scores[0], scores[1], comparisons


def common_rows(
    before: Sequence[Prediction], after: Sequence[Prediction]
) -> tuple[list[Prediction], list[Prediction]]:
    """The rows that both have answered, in the order of the first.

    Raises:
        EvaluationError: there is none (`evaluate.unpaired`).
    """
    answered = {each.id: each for each in after}
    pairs = [(each, answered[each.id]) for each in before if each.id in answered]
    if not pairs:
        raise EvaluationError(
            "evaluate.unpaired",
            "predictions",
            found=f"no row in common among {len(before)} and {len(after)}",
            expected="two models' predictions of the same rows",
            try_="predict both from the same data file",
        )
    return [first for first, _ in pairs], [second for _, second in pairs]


def check_metrics(names: Names) -> None:
    """Refuses names that nothing is known of, before a model is loaded for them.

    Raises:
        UserError: a name is unknown (`evaluate.unknown-metric`).
    """
    if not isinstance(names, str):
        _chosen(names)


def _chosen(names: Sequence[str]) -> list[tuple[Metric, str | None]]:
    """The metrics with the single figure that is wanted of each, None for all of them.

    Raises:
        UserError: a name is unknown (`evaluate.unknown-metric`).
    """
    owners = {score: metric for metric in METRICS.values() for score in metric.scores}
    chosen: list[tuple[Metric, str | None]] = []
    for name in names:
        if name in METRICS:
            chosen.append((METRICS[name], None))
        elif name in owners:
            chosen.append((owners[name], name))
        else:
            near = difflib.get_close_matches(name, [*METRICS, *owners], n=1)
            raise UserError(
                "evaluate.unknown-metric",
                "metrics",
                found=repr(name),
                expected=f"auto, or of {', '.join(sorted(METRICS))}",
                try_=f"did you mean {near[0]}?" if near else None,
            )
    return chosen
