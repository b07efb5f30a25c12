"""Classification by answers: the figures of OpenAI's `compute_classification_metrics`, and more.

Shape letters: B resamples, R rows, C labels, K statistics of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from tunesmith.errors import UserError
from tunesmith.evaluate.intervals import Floats, Measured, from_sums, ratio, share_of
from tunesmith.evaluate.metrics.base import MeasureOptions
from tunesmith.evaluate.metrics.classification import (
    ClassReport,
    auroc_at,
    average_precision_at,
    class_report,
    f_beta,
)
from tunesmith.evaluate.metrics.text import normalize
from tunesmith.evaluate.prediction import Prediction

NORMAL = "norm:nfkc+strip+casefold"

POSITIVE = frozenset(
    {"yes", "true", "positive", "1", "是", "对", "正面", "正确", "有", "spam", "y"}
)
"""Of two labels the one that is meant by precision and recall, if just one of them is here."""


def classification(predictions: Sequence[Prediction], options: MeasureOptions) -> list[Measured]:
    """Accuracy, F1 by mean and by support, invalid answers; with two labels more.

    AUROC and AUPRC need predictions with log-probabilities: the first token's probability is taken
    for that of the whole label.
    """
    real = [None if each.label is None else _folded(each.label) for each in predictions]
    answered = [_folded(each.prediction) for each in predictions]
    labels = _labels(real, options)
    has_chances = all(each.logprobs for each in predictions)
    positive = _positive_of(labels, options.positive_class)
    chances = [_chance(each, labels, positive) for each in predictions] if has_chances else None
    return _figures(real, answered, labels, positive, options.betas, chances=chances)


def classify_probabilities(
    real: Sequence[str | None],
    probabilities: Sequence[Mapping[str, float]],
    options: MeasureOptions | None = None,
) -> list[Measured]:
    """As `classification`, of a classifier's own probabilities, such as `tunesmith score` writes.

    Args:
        real: labels, None for a row without.
        probabilities: of every label, for each row; the likeliest is the answer.
        options: `positive_class` and `betas` are read.

    Returns:
        the figures; of those that one class alone gives no value, AUROC and AUPRC, none.
    """
    options = options or MeasureOptions()
    answered = [max(row, key=lambda label, row=row: row[label]) for row in probabilities]
    # A label that the classifier does not know can only be got wrong.
    known = dict.fromkeys(probabilities[0]) if probabilities else dict[str, None]()
    labels = tuple(known | dict.fromkeys(label for label in real if label is not None))
    positive = _positive_of(labels, options.positive_class)
    chances = None if positive is None else [row.get(positive, 0.0) for row in probabilities]
    source: Literal["probabilities"] = "probabilities"
    found = _figures(
        real, answered, labels, positive, options.betas, chances=chances, chances_from=source
    )
    return [each for each in found if not math.isnan(each.value)]


def report_of(predictions: Sequence[Prediction], options: MeasureOptions) -> ClassReport:
    """Figures of each label and the confusion matrix, of the rows that have a label."""
    pairs = [
        (_folded(each.label), _folded(each.prediction))
        for each in predictions
        if each.label is not None
    ]
    labels = _labels([label for label, _ in pairs], options)
    return class_report([label for label, _ in pairs], [answer for _, answer in pairs], labels)


def _figures(
    real: Sequence[str | None],
    answered: Sequence[str],
    labels: tuple[str, ...],
    positive: str | None,
    betas: Sequence[float],
    *,
    chances: Sequence[float] | None,
    chances_from: Literal["first-token", "probabilities"] = "first-token",
) -> list[Measured]:
    norm = NORMAL if chances_from == "first-token" else "norm:none|answer:likeliest"
    signature = f"labels:{len(labels)}|{norm}"
    right = [None if r is None else r == a for r, a in zip(real, answered, strict=True)]
    known = set(labels)
    invalid = [None if r is None else a not in known for r, a in zip(real, answered, strict=True)]
    found = [
        share_of("accuracy", right, signature=signature),
        *_f1_figures(real, answered, labels, signature),
        share_of("invalid", invalid, signature=signature, better="lower"),
    ]
    if positive is None:
        return found
    signature = f"{signature}|positive:{positive}"
    found += _binary_figures(real, answered, positive, betas, signature)
    if chances is not None:
        found += _area_figures(real, chances, positive, f"{signature}|from:{chances_from}")
    return found


def _f1_figures(
    real: Sequence[str | None], answered: Sequence[str], labels: tuple[str, ...], signature: str
) -> list[Measured]:
    """F1 by mean and by support, as functions of counts by label: hits, answers, real ones."""
    size, numbers = len(labels), {label: number for number, label in enumerate(labels)}
    stats_RK = np.zeros((len(real), 3 * size))
    for row, (truth, answer) in enumerate(zip(real, answered, strict=True)):
        if truth is None:
            continue
        place = numbers[truth]
        stats_RK[row, 2 * size + place] = 1
        if answer in numbers:
            stats_RK[row, size + numbers[answer]] = 1
            stats_RK[row, place] = answer == truth

    def f1_BC(sums_BK: Floats) -> Floats:
        hits_BC, given_BC, real_BC = np.split(sums_BK, 3, axis=1)
        return ratio(2 * hits_BC, given_BC + real_BC, empty=0.0)

    def macro(sums_BK: Floats) -> Floats:
        return f1_BC(sums_BK).mean(axis=1)

    def weighted(sums_BK: Floats) -> Floats:
        real_BC = sums_BK[:, 2 * size :]
        return ratio((f1_BC(sums_BK) * real_BC).sum(axis=1), real_BC.sum(axis=1))

    return [
        _whole(name, stats_RK, of_sums, real, signature)
        for name, of_sums in (("macro_f1", macro), ("weighted_f1", weighted))
    ]


def _binary_figures(
    real: Sequence[str | None],
    answered: Sequence[str],
    positive: str,
    betas: Sequence[float],
    signature: str,
) -> list[Measured]:
    stats_RK = np.array(
        [
            [0, 0, 0] if r is None else [r == a == positive, a == positive, r == positive]
            for r, a in zip(real, answered, strict=True)
        ],
        dtype=np.float64,
    )

    def precision(sums_BK: Floats) -> Floats:
        return ratio(sums_BK[:, 0], sums_BK[:, 1], empty=0.0)

    def recall(sums_BK: Floats) -> Floats:
        return ratio(sums_BK[:, 0], sums_BK[:, 2], empty=0.0)

    found = [
        _whole("precision", stats_RK, precision, real, signature),
        _whole("recall", stats_RK, recall, real, signature),
    ]
    for beta in betas:

        def of_sums(sums_BK: Floats, beta: float = beta) -> Floats:
            return f_beta(precision(sums_BK), recall(sums_BK), beta)

        found.append(_whole(f"f{beta:g}", stats_RK, of_sums, real, signature))
    return found


def _whole(
    name: str,
    stats_RK: Floats,
    of_sums: Callable[[Floats], Floats],
    real: Sequence[str | None],
    signature: str,
) -> Measured:
    """A figure that no row has alone."""
    num_rows = sum(label is not None for label in real)
    return from_sums(
        name, stats_RK, of_sums, rows=(None,) * len(real), signature=signature, num_rows=num_rows
    )


def _area_figures(
    real: Sequence[str | None], chances: Sequence[float], positive: str, signature: str
) -> list[Measured]:
    """AUROC and AUPRC; rows without a label weigh nothing."""
    has_label_R = np.array([label is not None for label in real], dtype=np.float64)
    is_positive_R = np.array([label == positive for label in real])
    chance_R = np.array(chances, dtype=np.float64)

    def roc(weight_BR: Floats) -> Floats:
        return auroc_at(weight_BR * has_label_R, is_positive_R, chance_R)

    def precision_recall(weight_BR: Floats) -> Floats:
        return average_precision_at(weight_BR * has_label_R, is_positive_R, chance_R)

    rows, num_rows = (None,) * len(real), int(has_label_R.sum())
    return [
        Measured("auroc", f"{signature}|ties:half", "higher", roc, rows, num_rows),
        Measured(
            "auprc", f"{signature}|average-precision", "higher", precision_recall, rows, num_rows
        ),
    ]


def _chance(prediction: Prediction, labels: Sequence[str], positive: str | None) -> float:
    """That the answer is the positive label: the first token's probability, or what it leaves.

    An answer that is no label speaks for neither.
    """
    pairs, answer = prediction.logprobs or (), _folded(prediction.prediction)
    if not pairs or answer not in labels:
        return 0.5
    chance = math.exp(pairs[0][1])
    return chance if answer == positive else 1 - chance


def _positive_of(labels: tuple[str, ...], given: str | None) -> str | None:
    """The positive one of two labels, None if nobody knows.

    Raises:
        UserError: the one given is no label (`evaluate.positive-class`).
    """
    if given is not None:
        wanted = given if given in labels else _folded(given)
        if wanted not in labels:
            raise UserError(
                "evaluate.positive-class",
                "metric classification",
                found=repr(given),
                expected=f"one of {', '.join(labels[:10])}",
            )
        return wanted
    known = [label for label in labels if _folded(label) in POSITIVE]
    return known[0] if len(labels) == 2 and len(known) == 1 else None


def _labels(real: Sequence[str | None], options: MeasureOptions) -> tuple[str, ...]:
    """Those given, in their order, and those of the data."""
    given = dict.fromkeys(map(_folded, options.labels))
    return tuple(given | dict.fromkeys(sorted({label for label in real if label is not None})))


def _folded(text: str) -> str:
    return normalize(text).casefold()
