"""Answers against labels, one by one: exact match, token F1, edit distance, error rates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from tunesmith.evaluate.intervals import Floats, Measured, from_sums, mean_of, ratio, share_of
from tunesmith.evaluate.metrics.base import MeasureOptions, per_row
from tunesmith.evaluate.metrics.distance import edit_distance
from tunesmith.evaluate.metrics.text import normalize, units, words
from tunesmith.evaluate.prediction import Prediction

NORMAL = "norm:nfkc+strip"

_ARTICLES = frozenset({"a", "an", "the"})


def exact_match(predictions: Sequence[Prediction], _: MeasureOptions) -> list[Measured]:
    """The share of answers that are their labels."""
    rows = per_row(predictions, lambda a, b: normalize(a) == normalize(b))
    return [share_of("exact_match", rows, signature=NORMAL)]


def contains(predictions: Sequence[Prediction], _: MeasureOptions) -> list[Measured]:
    """The share of answers in which the label stands somewhere."""
    rows = per_row(predictions, lambda a, b: _folded(b) in _folded(a))
    return [share_of("contains", rows, signature=f"{NORMAL}|case:folded")]


def token_f1(predictions: Sequence[Prediction], _: MeasureOptions) -> list[Measured]:
    """The overlap of words, as SQuAD counts it (arXiv:1606.05250)."""
    signature = "tok:cjk-char+word|norm:nfkc|case:lower|punct:dropped|articles:dropped"
    return [mean_of("token_f1", per_row(predictions, _overlap), signature=signature)]


def edits(predictions: Sequence[Prediction], _: MeasureOptions) -> list[Measured]:
    """Edit distance in characters, and its share of the longer text."""
    distances = per_row(predictions, lambda a, b: edit_distance(normalize(b), normalize(a)))
    longest = per_row(predictions, lambda a, b: max(len(normalize(a)), len(normalize(b))))
    alike = [
        None if distance is None or length is None else 1 - distance / max(length, 1)
        for distance, length in zip(distances, longest, strict=True)
    ]
    signature = f"levenshtein|unit:char|{NORMAL}"
    return [
        mean_of("edit_distance", distances, signature=signature, better="lower"),
        mean_of("edit_similarity", alike, signature=f"{signature}|of:longer"),
    ]


def character_errors(predictions: Sequence[Prediction], _: MeasureOptions) -> list[Measured]:
    """Character error rate."""
    cut = "unit:char|space:dropped"
    return [_error_rate("cer", predictions, lambda text: "".join(text.split()), cut)]


def word_errors(predictions: Sequence[Prediction], _: MeasureOptions) -> list[Measured]:
    """Word error rate; characters and marks of writing without spaces count as words."""
    return [_error_rate("wer", predictions, units, "unit:cjk-char+word+mark|case:lower")]


def _error_rate(
    name: str,
    predictions: Sequence[Prediction],
    cut: Callable[[str], Sequence[str]],
    signature: str,
) -> Measured:
    """Edits of all rows over the lengths of all labels."""
    stats_RK = np.zeros((len(predictions), 2))
    for row, each in enumerate(predictions):
        if each.label is not None:
            label, answer = cut(normalize(each.label)), cut(normalize(each.prediction))
            stats_RK[row] = edit_distance(label, answer), len(label)
    rows = [
        None if each.label is None or not length else float(distance / length)
        for each, (distance, length) in zip(predictions, stats_RK, strict=True)
    ]

    def of_sums(sums_BK: Floats) -> Floats:
        return ratio(sums_BK[:, 0], sums_BK[:, 1])

    signature = f"levenshtein|{signature}|norm:nfkc|corpus"
    return from_sums(name, stats_RK, of_sums, rows=rows, signature=signature, better="lower")


def _folded(text: str) -> str:
    return normalize(text).casefold()


def _overlap(answer: str, label: str) -> float:
    given, wanted = (
        [word for word in words(normalize(text)) if word not in _ARTICLES]
        for text in (answer, label)
    )
    common = (Counter(given) & Counter(wanted)).total()
    if not given or not wanted:
        return float(given == wanted)
    return 2 * common / (len(given) + len(wanted))
