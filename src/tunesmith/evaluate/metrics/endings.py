"""How answers end and how long they are: what goes wrong before their contents do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tunesmith.evaluate.intervals import Floats, Measured, from_sums, mean_of, ratio, share_of
from tunesmith.evaluate.metrics.base import MeasureOptions
from tunesmith.evaluate.metrics.text import has_letter, units
from tunesmith.evaluate.prediction import Prediction

LOOPS = 4
LOOP_UNITS = 16
"""A loop is a block of units at least 4 times in a row over at least 16 units: a 4-gram four times.
Shorter ones are natural: `ha ha ha ha`, `very, very, very`."""

TAIL_UNITS = 20
"""An answer that the limit cut also loops if it ends in a block of at least 20 units twice over."""

LONGEST_BLOCK = 200


def stop_rate(predictions: Sequence[Prediction], _: MeasureOptions) -> list[Measured]:
    """The share of answers that the model ended by itself."""
    rows = [each.finish_reason == "stop" for each in predictions]
    return [share_of("stop_rate", rows, signature="finish_reason:stop")]


def repeat_rate(predictions: Sequence[Prediction], _: MeasureOptions) -> list[Measured]:
    """The share of answers that run in a loop."""
    rows = [
        is_looping(each.prediction, is_cut=each.finish_reason == "length") for each in predictions
    ]
    signature = (
        f"block*{LOOPS}>={LOOP_UNITS}|cut-tail:block*2,block>={TAIL_UNITS}|"
        f"block<={LONGEST_BLOCK}|unit:cjk-char+word+mark"
    )
    return [share_of("repeat_rate", rows, signature=signature, better="lower")]


def lengths(predictions: Sequence[Prediction], _: MeasureOptions) -> list[Measured]:
    """Mean tokens of answers, and their characters for each of the labels'."""
    tokens = [float(each.completion_tokens) for each in predictions]
    found = [
        mean_of("answer_tokens", tokens, signature="mean|unit:the model's tokens", better="neither")
    ]
    if any(each.label for each in predictions):
        found.append(_length_ratio(predictions))
    return found


def is_looping(text: str, *, is_cut: bool) -> bool:
    """Whether a text repeats a block as `LOOPS`, `LOOP_UNITS` and `TAIL_UNITS` say.

    A block of marks alone is none: rules, dots and table lines repeat by right.

    Args:
        text: of the answer.
        is_cut: whether it ended at the limit of tokens.
    """
    parts = units(text)
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(part, len(numbers)) for part in parts], dtype=np.int64)
    for period in range(1, min(len(parts) // 2, LONGEST_BLOCK) + 1):
        is_same = ids[period:] == ids[:-period]
        start = _loop_start(is_same, max((LOOPS - 1) * period, LOOP_UNITS - period))
        if start is not None and has_letter(parts[start : start + period]):
            return True
        is_tail = is_cut and period >= TAIL_UNITS and bool(is_same[-period:].all())
        if is_tail and has_letter(parts[-period:]):
            return True
    return False


def _loop_start(is_same: NDArray[np.bool_], length: int) -> int | None:
    """Where the first run of so many True begins."""
    if length > len(is_same):
        return None
    ends = np.flatnonzero(np.diff(np.concatenate(([False], is_same, [False])).astype(np.int8)))
    runs = ends.reshape(-1, 2)
    long = runs[runs[:, 1] - runs[:, 0] >= length]
    return int(long[0, 0]) if len(long) else None


def _length_ratio(predictions: Sequence[Prediction]) -> Measured:
    stats_RK = np.array(
        [[len(each.prediction), len(each.label)] if each.label else [0, 0] for each in predictions],
        dtype=np.float64,
    )
    rows = [float(given / wanted) if wanted else None for given, wanted in stats_RK]

    def of_sums(sums_BK: Floats) -> Floats:
        return ratio(sums_BK[:, 0], sums_BK[:, 1])

    signature = "answer/label|unit:char|corpus"
    return from_sums(
        "length_ratio", stats_RK, of_sums, rows=rows, signature=signature, better="neither"
    )
