"""BLEU and chrF, equal to sacrebleu's to the last digit, in a form that can be resampled.

BLEU's tokens and counts are sacrebleu's own (W18-6319); the formula over the sums of counts stands
here for many resamples at once, and so does chrF (W15-3049), which sacrebleu gives no counts of.

Shape letters: B resamples, R rows, K statistics of a row, N orders.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from tunesmith.evaluate.intervals import Floats, Measured, from_sums, ratio
from tunesmith.evaluate.metrics.base import MeasureOptions
from tunesmith.evaluate.metrics.text import script_of
from tunesmith.evaluate.prediction import Prediction

BLEU_ORDERS = 4
CHRF_ORDERS = 6
CHRF_BETA = 2


def bleu(predictions: Sequence[Prediction], _: MeasureOptions) -> list[Measured]:
    """Corpus BLEU-4, cut as the labels' writing needs it; rows have smoothed sentence BLEU."""
    from sacrebleu.metrics.bleu import BLEU

    tokenizer, why = bleu_tokenizer(predictions)
    # Sentences need the effective order; the counts are the same without.
    scorer = BLEU(tokenize=tokenizer, effective_order=True)
    stats_RK = np.zeros((len(predictions), 2 + 2 * BLEU_ORDERS))
    rows: list[float | None] = []
    for row, each in enumerate(predictions):
        if each.label is None:
            rows.append(None)
            continue
        found = scorer.sentence_score(each.prediction, [each.label])
        stats_RK[row] = [found.sys_len, found.ref_len, *found.counts, *found.totals]
        rows.append(found.score)
    signature = (
        f"nrefs:1|case:mixed|eff:no|tok:{tokenizer}({why})|smooth:exp|"
        f"version:{version('sacrebleu')}"
    )
    return [from_sums("bleu", stats_RK, bleu_of_sums, rows=rows, signature=signature)]


def bleu_tokenizer(predictions: Sequence[Prediction]) -> tuple[str, str]:
    """The tokenizer of sacrebleu for the labels, and what chose it."""
    script = script_of(each.label for each in predictions if each.label is not None)
    has_mecab = all(importlib.util.find_spec(name) is not None for name in ("MeCab", "ipadic"))
    if script == "ja" and has_mecab:
        return "ja-mecab", script
    chosen = {"zh": "zh", "ja": "char", "unspaced": "char", "spaced": "13a"}
    return chosen[script], script


def bleu_of_sums(sums_BK: Floats) -> Floats:
    """BLEU of summed counts: lengths of answers and labels, matches and n-grams by order."""
    lengths_B, wanted_B = sums_BK[:, 0], sums_BK[:, 1]
    matched_BN, total_BN = sums_BK[:, 2 : 2 + BLEU_ORDERS], sums_BK[:, 2 + BLEU_ORDERS :]
    # Each order without a match halves what it counts as, as in NIST's mteval.
    is_missed_BN = matched_BN == 0
    halved_BN = 1.0 / 2.0 ** np.cumsum(is_missed_BN, axis=1)
    precision_BN = ratio(np.where(is_missed_BN, halved_BN, matched_BN), total_BN, empty=0.0)
    with np.errstate(divide="ignore"):
        mean_B = np.exp(np.log(precision_BN).mean(axis=1))
    shortness_B = np.minimum(0.0, 1 - ratio(wanted_B, lengths_B, empty=math.inf))
    return np.where(matched_BN.any(axis=1), 100 * np.exp(shortness_B) * mean_B, 0.0)


def chrf(predictions: Sequence[Prediction], _: MeasureOptions) -> list[Measured]:
    """chrF2: n-grams of up to 6 characters, recall twice as heavy as precision."""
    stats_RK = np.zeros((len(predictions), 3 * CHRF_ORDERS))
    for row, each in enumerate(predictions):
        if each.label is not None:
            stats_RK[row] = _chrf_counts(each.prediction, each.label)
    alone_R = chrf_of_sums(stats_RK)
    rows = [
        None if each.label is None else float(value)
        for each, value in zip(predictions, alone_R, strict=True)
    ]
    signature = "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|own, as sacrebleu 2"
    return [from_sums("chrf", stats_RK, chrf_of_sums, rows=rows, signature=signature)]


def chrf_of_sums(sums_BK: Floats) -> Floats:
    """ChrF of summed counts: by order the answer's n-grams, the label's, and those of both."""
    answer_BN, label_BN, both_BN = sums_BK[:, 0::3], sums_BK[:, 1::3], sums_BK[:, 2::3]
    is_used_BN = (answer_BN > 0) & (label_BN > 0)
    orders_B = is_used_BN.sum(axis=1).astype(float)
    precision_B, recall_B = (
        ratio((ratio(both_BN, below, empty=0.0) * is_used_BN).sum(axis=1), orders_B, empty=0.0)
        for below in (answer_BN, label_BN)
    )
    factor = CHRF_BETA**2
    above_B = 100 * (1 + factor) * precision_B * recall_B
    return ratio(above_B, factor * precision_B + recall_B, empty=0.0)


def _chrf_counts(answer: str, label: str) -> list[int]:
    given, wanted = "".join(answer.split()), "".join(label.split())
    found: list[int] = []
    for order in range(1, CHRF_ORDERS + 1):
        ours, theirs = ngrams(given, order), ngrams(wanted, order)
        # An order that the label is too short for counts for nothing.
        found += [ours.total() if theirs else 0, theirs.total(), (ours & theirs).total()]
    return found


def ngrams(items: Sequence[str], order: int) -> Counter[Sequence[str]]:
    """How often every run of so many items stands there; items of a list become tuples."""
    keys = items if isinstance(items, str) else tuple(items)
    return Counter(keys[first : first + order] for first in range(len(keys) - order + 1))
