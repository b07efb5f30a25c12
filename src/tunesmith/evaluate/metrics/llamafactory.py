"""The figures that LLaMA-Factory's `predict_with_generate` prints, to reproduce and compare them.

They are not comparable with anything else: BLEU is the mean of sentence BLEUs over characters, in
English, too, smoothed as nltk's method 3; ROUGE counts every n-gram once, by jieba's words. Every
row is rounded to four digits before the mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from importlib.metadata import version

from tunesmith.evaluate.intervals import Measured, mean_of
from tunesmith.evaluate.metrics.base import MeasureOptions, per_row
from tunesmith.evaluate.metrics.distance import common_length
from tunesmith.evaluate.metrics.ngrams import ngrams
from tunesmith.evaluate.metrics.rouge import jieba_words
from tunesmith.evaluate.prediction import Prediction

ORDERS = 4


def bleu4(predictions: Sequence[Prediction], _: MeasureOptions) -> list[Measured]:
    """BLEU-4 over characters, mean over rows."""
    rows = per_row(predictions, lambda a, b: round(100 * sentence_bleu(a, b), 4))
    signature = "sentence|tok:char|smooth:nltk-method3|round:4|mean|own, as LLaMA-Factory"
    return [mean_of("bleu4_llamafactory", rows, signature=signature)]


def rouge(predictions: Sequence[Prediction], _: MeasureOptions) -> list[Measured]:
    """ROUGE-1, 2 and L of jieba's words, mean over rows.

    Raises:
        UserError: jieba is not there (`evaluate.library`).
    """
    cut = jieba_words()
    pairs = [
        None if each.label is None else (_tokens(cut(each.prediction)), _tokens(cut(each.label)))
        for each in predictions
    ]
    signature = f"f1|tok:jieba-{version('jieba')}|round:4|mean|own, as rouge-chinese 1"
    figures = {"rouge1": 1, "rouge2": 2, "rougel": None}
    return [
        mean_of(
            f"{name}_llamafactory",
            [None if pair is None else round(100 * _rouge(*pair, order), 4) for pair in pairs],
            signature=f"{signature}|set" if order else signature,
        )
        for name, order in figures.items()
    ]


def sentence_bleu(answer: str, label: str) -> float:
    """Sentence BLEU as nltk's, over characters, with smoothing method 3 (W14-3346); 0 to 1."""
    matched: list[int] = []
    totals: list[int] = []
    for order in range(1, ORDERS + 1):
        ours, theirs = ngrams(answer, order), ngrams(label, order)
        matched.append((ours & theirs).total())
        totals.append(max(1, ours.total()))
    if not matched[0]:
        return 0.0
    halvings, logs = 0, 0.0
    for match, total in zip(matched, totals, strict=True):
        halvings += match == 0
        share = match / total if match else 1 / (2**halvings * total)
        logs += math.log(share) / ORDERS
    shortness = min(0.0, 1 - len(label) / len(answer))
    return math.exp(shortness) * math.exp(logs)


def _rouge(answer: list[str], label: list[str], order: int | None) -> float:
    if not any(answer) or not any(label):
        return 0.0
    if order is None:
        common, given, wanted = common_length(answer, label), len(answer), len(label)
    else:
        ours, theirs = set(ngrams(answer, order)), set(ngrams(label, order))
        common, given, wanted = len(ours & theirs), len(ours), len(theirs)
    precision = common / given if given else 0.0
    recall = common / wanted if wanted else 0.0
    return 2 * precision * recall / (precision + recall + 1e-8)


_ENDS = (
    (re.compile(r"([。！？?])([^”’])"), r"\1\n\2"),
    (re.compile(r"(\.{6})([^”’])"), r"\1\n\2"),
    (re.compile(r"(…{2})([^”’])"), r"\1\n\2"),
    (re.compile(r"([。！？?][”’])([^，。！？?])"), r"\1\n\2"),
)
"""Where rouge-chinese ends sentences; it cuts tokens there, and spaces between two ends are one."""


def _tokens(cut: list[str]) -> list[str]:
    text = " ".join(cut)
    for pattern, replacement in _ENDS:
        text = pattern.sub(replacement, text)
    lines = [line for line in text.rstrip().split("\n") if line]
    return [token for line in lines for token in " ".join(line.split()).split(" ")]
