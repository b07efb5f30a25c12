"""ROUGE-1, 2 and L (W04-1013): F1 by row, mean over rows.

By words where words have spaces between them, equal to rouge-score without stemming on English; by
characters and marks where they have not: rouge-score finds no word in Chinese and scores it 0.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from importlib.metadata import version

from tunesmith.evaluate.intervals import Measured, mean_of
from tunesmith.evaluate.metrics.base import MeasureOptions, missing_library
from tunesmith.evaluate.metrics.distance import common_length
from tunesmith.evaluate.metrics.ngrams import ngrams
from tunesmith.evaluate.metrics.text import script_of, units, words
from tunesmith.evaluate.prediction import Prediction

Cut = Callable[[str], list[str]]


def rouge(predictions: Sequence[Prediction], _: MeasureOptions) -> list[Measured]:
    """By characters or words, as the labels' writing needs it."""
    script = script_of(each.label for each in predictions if each.label is not None)
    if script == "spaced":
        cut, how = words, "tok:word|case:lower|punct:dropped"
    else:
        cut, how = units, f"tok:char({script})|case:lower|punct:kept"
    return _figures(predictions, cut, how, ("rouge_1", "rouge_2", "rouge_l"))


def rouge_words(predictions: Sequence[Prediction], _: MeasureOptions) -> list[Measured]:
    """By the words that jieba cuts Chinese into.

    Raises:
        UserError: jieba is not there (`evaluate.library`).
    """
    cut = jieba_words()
    how = f"tok:jieba-{version('jieba')}|case:mixed|punct:kept"
    names = ("rouge_word_1", "rouge_word_2", "rouge_word_l")
    return _figures(predictions, lambda text: [w for w in cut(text) if w.strip()], how, names)


def jieba_words() -> Cut:
    """Cuts as jieba does, without its message about the dictionary.

    Raises:
        UserError: it is not there (`evaluate.library`).
    """
    if importlib.util.find_spec("jieba") is None:
        raise missing_library("rouge_word", "jieba", "zh")
    import warnings

    with warnings.catch_warnings():
        # jieba 0.42.1, the last one, has escapes that Python 3.12 warns of, and pkg_resources.
        warnings.simplefilter("ignore")
        import jieba
    jieba.setLogLevel("WARNING")
    return lambda text: [str(word) for word in jieba.cut(text)]


def rouge_n(answer: Sequence[str], label: Sequence[str], order: int) -> float:
    """F1 of runs of so many tokens, each counted as often as both have it; 0 to 1."""
    ours, theirs = ngrams(answer, order), ngrams(label, order)
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(answer: Sequence[str], label: Sequence[str]) -> float:
    """F1 of the longest common subsequence; 0 to 1."""
    return _f1(common_length(label, answer), len(answer), len(label))


def _figures(
    predictions: Sequence[Prediction], cut: Cut, how: str, names: tuple[str, str, str]
) -> list[Measured]:
    cuts = [
        None if each.label is None else (cut(each.prediction), cut(each.label))
        for each in predictions
    ]
    measures = (lambda a, b: rouge_n(a, b, 1), lambda a, b: rouge_n(a, b, 2), rouge_l)
    signature = f"f1|{how}|stem:no|mean|own"
    return [
        mean_of(
            name,
            [None if pair is None else 100 * measure(*pair) for pair in cuts],
            signature=signature,
        )
        for name, measure in zip(names, measures, strict=True)
    ]


def _f1(common: int, given: int, wanted: int) -> float:
    if not common:
        return 0.0
    precision, recall = common / given, common / wanted
    return 2 * precision * recall / (precision + recall)
