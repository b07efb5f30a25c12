"""Accuracy, precision, recall, F, AUROC and AUPRC, from arrays; equal to scikit-learn's.

Shape letters: B resamples, R rows, C labels, G groups of rows with equal scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.evaluate.intervals import Floats, ratio


@dataclass(frozen=True, slots=True)
class ClassReport:
    """What a classifier gets right, by label.

    Args:
        labels: in the order of all that follows.
        confusion: rows are real labels, columns are answers; a last column counts answers that
            are no label.
        accuracy: share of rows that are right.
        precision: of each label, 0 where it was never answered.
        recall: of each label, 0 where it never is real.
        f1: of each label.
        support: rows of each label.
        macro_f1: mean over the labels.
        weighted_f1: mean over the labels, by support.
        num_invalid: answers that are no label.
    """

    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    accuracy: float
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    f1: tuple[float, ...]
    support: tuple[int, ...]
    macro_f1: float
    weighted_f1: float
    num_invalid: int


def class_report(
    real: Sequence[str], answered: Sequence[str], labels: Sequence[str]
) -> ClassReport:
    """Counts answers by label; one that is none of the labels is wrong and counted as invalid."""
    numbers = {label: number for number, label in enumerate(labels)}
    size = len(labels)
    confusion = np.zeros((size, size + 1), dtype=np.int64)
    for truth, answer in zip(real, answered, strict=True):
        confusion[numbers[truth], numbers.get(answer, size)] += 1
    hits = confusion.diagonal().astype(float)
    support, given = confusion.sum(axis=1), confusion.sum(axis=0)[:size]
    f1 = ratio(2 * hits, (support + given).astype(float), empty=0.0)
    total = max(1, int(support.sum()))
    return ClassReport(
        labels=tuple(labels),
        confusion=tuple(tuple(int(cell) for cell in row) for row in confusion),
        accuracy=float(hits.sum() / total),
        precision=_floats(ratio(hits, given.astype(float), empty=0.0)),
        recall=_floats(ratio(hits, support.astype(float), empty=0.0)),
        f1=_floats(f1),
        support=tuple(int(count) for count in support),
        macro_f1=float(f1.mean()) if size else math.nan,
        weighted_f1=float((f1 * support).sum() / total),
        num_invalid=int(confusion[:, size].sum()),
    )


def f_beta(precision: Floats, recall: Floats, beta: float) -> Floats:
    """F-beta, 0 where both are 0."""
    return ratio((1 + beta**2) * precision * recall, beta**2 * precision + recall, empty=0.0)


def auroc(is_positive_R: Sequence[bool], score_R: Sequence[float]) -> float:
    """Area under the ROC curve; equal scores count half. NaN with one class alone."""
    weight_BR = np.ones((1, len(is_positive_R)))
    return float(auroc_at(weight_BR, np.asarray(is_positive_R), np.asarray(score_R))[0])


def average_precision(is_positive_R: Sequence[bool], score_R: Sequence[float]) -> float:
    """Area under the precision-recall curve, by steps. NaN without a positive row."""
    weight_BR = np.ones((1, len(is_positive_R)))
    found = average_precision_at(weight_BR, np.asarray(is_positive_R), np.asarray(score_R))
    return float(found[0])


def auroc_at(weight_BR: Floats, is_positive_R: NDArray[np.bool_], score_R: Floats) -> Floats:
    """AUROC with each row counted so many times."""
    hits_BG, misses_BG = _curve(weight_BR, is_positive_R, score_R)
    steps_BG = np.diff(misses_BG, axis=1, prepend=0)
    before_BG = np.concatenate([np.zeros((len(hits_BG), 1)), hits_BG[:, :-1]], axis=1)
    area_B = (steps_BG * (hits_BG + before_BG)).sum(axis=1) / 2
    return ratio(area_B, hits_BG[:, -1] * misses_BG[:, -1])


def average_precision_at(
    weight_BR: Floats, is_positive_R: NDArray[np.bool_], score_R: Floats
) -> Floats:
    """Average precision with each row counted so many times."""
    hits_BG, misses_BG = _curve(weight_BR, is_positive_R, score_R)
    precision_BG = ratio(hits_BG, hits_BG + misses_BG, empty=0.0)
    steps_BG = np.diff(hits_BG, axis=1, prepend=0)
    return ratio((steps_BG * precision_BG).sum(axis=1), hits_BG[:, -1])


def _curve(
    weight_BR: Floats, is_positive_R: NDArray[np.bool_], score_R: Floats
) -> tuple[Floats, Floats]:
    """Positive and negative rows from the highest score down to each that there is."""
    order_R = np.argsort(-score_R, kind="stable")
    sorted_R = score_R[order_R]
    last_G = np.append(np.flatnonzero(np.diff(sorted_R)), len(sorted_R) - 1)
    sorted_BR, positive_R = weight_BR[:, order_R], is_positive_R[order_R]
    hits_BR = np.cumsum(sorted_BR * positive_R, axis=1)
    misses_BR = np.cumsum(sorted_BR * ~positive_R, axis=1)
    return hits_BR[:, last_G], misses_BR[:, last_G]


def _floats(values: Floats) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
