"""What a model makes of the answers that the data gives: loss, perplexity, accuracy of tokens.

Shape letters: R rows, K statistics of a row, B resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tunesmith.data.columns import read_samples
from tunesmith.data.encode import Pipeline
from tunesmith.data.sources import Source
from tunesmith.data.templates import Renderer
from tunesmith.errors import Problem
from tunesmith.evaluate.given import given_answers
from tunesmith.evaluate.intervals import Floats, Measured, from_sums, ratio
from tunesmith.evaluate.prompts import Question
from tunesmith.infer.likelihood import GivenAnswer, Likeliest, Likelihood, read_likelihoods
from tunesmith.types import Completion, Conversation, Preference, Rated, Reporter, Sample

Place = tuple[str, int]
"""File and line of a row."""


def label_answers(
    sources: Sequence[Source], questions: Sequence[Question], renderer: Renderer
) -> dict[str, GivenAnswer]:
    """The data's own answers, rendered as in training, by the ids of their questions.

    Questions without an answer, and labels that are no text that a model says, have none.
    """
    ids = {(question.path, question.line): question.id for question in questions}
    samples = [
        _answered(row)
        for source in sources
        for row in read_samples(source.config, source.files)
        if not isinstance(row, Problem) and _place(row) in ids
    ]
    known = [sample for sample in samples if sample is not None]
    found: dict[str, GivenAnswer] = {}
    for sample, given in given_answers(Pipeline(renderer), known):
        if given is not None:
            found.setdefault(ids[_place(sample)], given)
    return found


def read_labels(
    model: Any,
    answers: Mapping[str, GivenAnswer],
    reporter: Reporter,
    *,
    remembers: bool = False,
    beside: Mapping[str, Likeliest] | None = None,
    label: str = "Reading labels",
) -> dict[str, Likelihood]:
    """What a model makes of each answer, by id; see `read_likelihoods`."""
    ids = list(answers)
    others = None if beside is None else [beside[each] for each in ids]
    readings = read_likelihoods(
        model, [answers[each] for each in ids], remembers=remembers, beside=others
    )
    bar = reporter.track(label, readings, len(ids))
    return {ids[number]: reading for number, reading in bar}


def label_figures(ids: Sequence[str], readings: Mapping[str, Likelihood]) -> list[Measured]:
    """Loss, perplexity and accuracy over the tokens of the labels, for rows in this order."""
    if not readings:
        return []
    stats_RK = np.array([_counted(readings.get(each)) for each in ids], dtype=np.float64)
    signature = "own|tokens of the last answer, its end included|natural logarithm"

    def of(top: int, transform: Callable[[Floats], Floats]) -> Callable[[Floats], Floats]:
        return lambda sums_BK: transform(ratio(sums_BK[:, top], sums_BK[:, 1]))

    def rows(top: int, transform: Callable[[Floats], Floats]) -> list[float | None]:
        means = transform(ratio(stats_RK[:, top], stats_RK[:, 1]))
        return [float(m) if n else None for m, n in zip(means, stats_RK[:, 1], strict=True)]

    def plain(values: Floats) -> Floats:
        return values

    loss = from_sums(
        "loss", stats_RK, of(0, plain), rows=rows(0, plain), signature=signature, better="lower"
    )
    perplexity = from_sums(
        "perplexity", stats_RK, of(0, np.exp), rows=rows(0, np.exp), signature=signature,
        better="lower",
    )  # fmt: skip
    accuracy = from_sums(
        "token_accuracy", stats_RK, of(2, plain), rows=rows(2, plain), signature=signature
    )
    return [loss, perplexity, accuracy]


def _counted(reading: Likelihood | None) -> tuple[float, float, float]:
    """Of a row the loss, the tokens, and those that the model itself would have taken."""
    if reading is None:
        return 0.0, 0.0, 0.0
    hits = float(reading.is_likeliest_L.sum())
    return -float(reading.logp_L.double().sum()), float(len(reading.logp_L)), hits


def _answered(sample: Sample) -> Sample | None:
    """The sample whose last answer is the label."""
    match sample:
        case Preference():
            return Conversation((*sample.prompt, *sample.chosen), sample.origin, sample.tools)
        case Rated():
            return _answered(sample.conversation)
        case Conversation():
            # As it is asked: the last message is the label, whatever weight training gave it.
            *before, last = sample.messages
            if last.role != "assistant":
                return None
            return replace(sample, messages=(*before, replace(last, weight=1.0)))
        case Completion():
            return sample
        case _:
            return None


def _place(sample: Sample) -> Place:
    origin = sample.origin
    return (f"{origin.path}:{origin.sheet}" if origin.sheet else origin.path, origin.line)
