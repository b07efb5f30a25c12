"""Figures of classifiers from counts, in plain numbers."""

from __future__ import annotations

from collections.abc import Sequence


def macro_f1(hits: Sequence[float], found: Sequence[float], there: Sequence[float]) -> float:
    """The mean of the labels' F1 scores, `2 hits / (found + there)`; 0 if there are none.

    Labels that neither stand in the data nor were found are left out, as scikit-learn does.

    Args:
        hits: of each label how many were found rightly, as numbers or as shares of one whole.
        found: how often it was found.
        there: how many there are.
    """
    scores = [
        2 * hit / (guessed + real)
        for hit, guessed, real in zip(hits, found, there, strict=True)
        if guessed + real
    ]
    return sum(scores) / len(scores) if scores else 0.0
