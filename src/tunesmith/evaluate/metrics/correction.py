"""Correction of sentences: precision, recall and F0.5 of edits.

The sentence to be corrected is aligned with the answer and with the label by characters
(Levenshtein); operations that touch are one edit; an edit is right if the label has the same
characters at the same place. This is how ERRANT and ChERRANT (MuCGEC, 2022.naacl-main.227) count
spans, but it is not their scorer: no transpositions, no weights by sound or shape of characters, no
marks kept apart from their neighbors, one reference, no dropping of long edits. Figures are close
to ChERRANT's by characters, and not to be put beside it, nor beside M2 figures of words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import UserError
from tunesmith.evaluate.intervals import Floats, Measured, from_sums, ratio
from tunesmith.evaluate.metrics.base import MeasureOptions, SourceRule
from tunesmith.evaluate.metrics.classification import f_beta
from tunesmith.evaluate.metrics.distance import edit_distance
from tunesmith.evaluate.metrics.text import normalize
from tunesmith.evaluate.prediction import Prediction

BETA = 0.5
LIKE_SOURCE = 0.6
"""Sources share so much with their labels, on average; texts that are no corrections do not."""

RULE_ROWS = 200
"""Enough to choose a rule by."""

Edit = tuple[int, int, str]

RULES: tuple[SourceRule, ...] = (
    "message",
    "after-first-line",
    "last-line",
    "last-paragraph",
    "colon",
)
"""In this order where several fit equally well."""


def correction(predictions: Sequence[Prediction], options: MeasureOptions) -> list[Measured]:
    """Precision, recall and F0.5 over all rows that have a label and a source sentence.

    Raises:
        UserError: no source sentence is found (`evaluate.no-source`).
    """
    rule = source_rule(predictions, options)
    if rule is None:
        raise UserError(
            "evaluate.no-source",
            "metric correction",
            found="prompts in which no sentence is like its label",
            expected="prompts that hold the sentence to be corrected",
            try_="say where it is: the options `source` or `source_pattern`",
        )
    stats_RK = np.zeros((len(predictions), 3))
    is_counted: list[bool] = []
    for row, each in enumerate(predictions):
        source = source_of(each, rule)
        is_counted.append(source is not None and each.label is not None)
        if source is not None and each.label is not None:
            ours = edits_between(source, each.prediction)
            theirs = edits_between(source, each.label)
            stats_RK[row] = len(ours & theirs), len(ours), len(theirs)
    figures = {"correction_precision": 0.0, "correction_recall": None, "correction_f05": BETA}
    signature = f"char-levenshtein|adjacent-merged|norm:nfkc|source:{rule}|refs:1|own, not M2"
    found: list[Measured] = []
    for name, beta in figures.items():

        def of_sums(sums_BK: Floats, beta: float | None = beta) -> Floats:
            return _f_of_sums(sums_BK, beta)

        alone = of_sums(stats_RK)
        rows = [float(v) if is_in else None for v, is_in in zip(alone, is_counted, strict=True)]
        found.append(from_sums(name, stats_RK, of_sums, rows=rows, signature=signature))
    return found


def source_rule(predictions: Sequence[Prediction], options: MeasureOptions) -> str | None:
    """Where source sentences stand: as the options say, else where prompts are most like labels.

    Chosen once for all rows, from prompts and labels alone. None if no place will do.
    """
    if options.source_pattern is not None:
        return f"pattern:{options.source_pattern}"
    rules = RULES if options.source == "auto" else (options.source,)
    labeled = [each for each in predictions if each.label is not None][:RULE_ROWS]
    likeness = {rule: _likeness(labeled, rule) for rule in rules}
    best = max(likeness, key=lambda rule: likeness[rule])
    return best if likeness[best] >= LIKE_SOURCE or options.source != "auto" else None


def source_of(prediction: Prediction, rule: str) -> str | None:
    """The sentence to be corrected: of the last user message, or of a plain prompt."""
    asked = [each for each in prediction.messages if each.get("role") == "user"]
    content = asked[-1].get("content") if asked else prediction.prompt
    if not isinstance(content, str):
        return None
    if rule.startswith("pattern:"):
        found = re.search(rule.removeprefix("pattern:"), content, re.DOTALL)
        return found.group(1).strip() if found and found.groups() else None
    text = content.strip()
    match rule:
        case "after-first-line":
            found = text.partition("\n")[2]
        case "last-line":
            found = text.rpartition("\n")[2]
        case "last-paragraph":
            found = text.rpartition("\n\n")[2]
        case "colon":
            found = re.split("[:：]", text, maxsplit=1)[-1]
        case _:
            found = text
    return found.strip() or None


def edits_between(source: str, target: str) -> set[Edit]:
    """The edits that make one text of the other: (start, end, what stands there instead).

    Deletions beside insertions stay two edits, as with ChERRANT; with a substitution among them,
    they are one.
    """
    first, second = normalize(source), normalize(target)
    found: set[Edit] = set()
    run: list[tuple[str, int, int]] = []
    for step in [*_alignment(first, second), ("end", len(first), len(second))]:
        if step[0] in ("keep", "end"):
            found |= _merged(run, step, second)
            run = []
        else:
            run.append(step)
    return found


Step = tuple[str, int, int]
"""Operation, and the places before it in both texts."""


def _merged(run: list[Step], after: Step, target: str) -> set[Edit]:
    """The edits of operations that touch; `after` stands where they end."""
    if not run:
        return set()
    _, start, at = run[0]
    _, end, to = after
    if {kind for kind, _, _ in run} == {"delete", "insert"}:
        return {(start, end, ""), (end, end, target[at:to])}
    return {(start, end, target[at:to])}


def _alignment(first: str, second: str) -> list[Step]:
    """A shortest way from one text to the other, found from their ends.

    Of equal ones always the same, or the label's way to drop one of two equal letters would not be
    the answer's. Hence only what both end with is kept without looking: to keep what both begin
    with would choose another of these ways.
    """
    tail = 0
    while tail < min(len(first), len(second)) and first[-1 - tail] == second[-1 - tail]:
        tail += 1
    row, column = len(first) - tail, len(second) - tail
    steps: list[Step] = [("keep", row, column)] if tail else []
    table = _table(first[:row], second[:column])
    while row or column:
        kind = _last_step(table, first, second, row, column)
        row -= kind != "insert"
        column -= kind != "delete"
        steps.append((kind, row, column))
    return steps[::-1]


def _last_step(
    table: NDArray[np.int32], first: str, second: str, row: int, column: int
) -> Literal["keep", "substitute", "delete", "insert"]:
    here = table[row, column]
    if row and column:
        is_equal = first[row - 1] == second[column - 1]
        if is_equal and table[row - 1, column - 1] == here:
            return "keep"
        if not is_equal and table[row - 1, column - 1] + 1 == here:
            return "substitute"
    return "delete" if row and table[row - 1, column] + 1 == here else "insert"


def _table(first: str, second: str) -> NDArray[np.int32]:
    """Distances of all beginnings of one text to all of the other."""
    letters = np.array([ord(letter) for letter in second], dtype=np.int64)
    columns = np.arange(len(second) + 1, dtype=np.int32)
    table = np.empty((len(first) + 1, len(second) + 1), dtype=np.int32)
    table[0] = columns
    for row, letter in enumerate(first, 1):
        above = table[row - 1]
        table[row] = above + 1
        table[row, 1:] = np.minimum(table[row, 1:], above[:-1] + (letters != ord(letter)))
        # Insertions run along the row: each costs one column.
        table[row] = np.minimum.accumulate(table[row] - columns) + columns
    return table


def _f_of_sums(sums_BK: Floats, beta: float | None) -> Floats:
    """Precision (beta 0), recall (None) or F-beta.

    With nothing to change and nothing changed all are 1. A model that changes nothing where there
    is something to change has a precision of 0 here; ERRANT says 1, which reads like praise.
    """
    right_B, ours_B, theirs_B = sums_BK.T
    is_idle_B = ((ours_B + theirs_B) == 0).astype(float)
    precision_B = ratio(right_B, ours_B, empty=0.0) + is_idle_B
    recall_B = ratio(right_B, theirs_B, empty=0.0) + is_idle_B
    if beta is None:
        return recall_B
    return f_beta(precision_B, recall_B, beta) if beta else precision_B


def _likeness(predictions: Sequence[Prediction], rule: str) -> float:
    """How much sources share with their labels: mean of 1 - distance / longer length."""
    shares: list[float] = []
    for each in predictions:
        source, label = source_of(each, rule), each.label
        if source and label:
            distance = edit_distance(label, source)
            shares.append(1 - distance / max(len(label), len(source)))
        else:
            shares.append(0.0)
    return sum(shares) / len(shares) if shares else 0.0
