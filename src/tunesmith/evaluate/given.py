"""Answers that the data gives, as tokens: what likelihoods are read of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tunesmith.data.encode import Pipeline
from tunesmith.errors import Problem
from tunesmith.infer.likelihood import GivenAnswer
from tunesmith.types import Sample


def given_answers(
    pipeline: Pipeline, samples: Sequence[Sample]
) -> Iterator[tuple[Sample, GivenAnswer | None]]:
    """Each sample with its last answer; None where it has none that follows anything."""
    for sample, tokens in pipeline.tokens_of(samples):
        if isinstance(tokens, Problem) or not tokens or not tokens[-1].runs:
            yield sample, None
            continue
        # Templates that change earlier turns split a conversation: the last sequence has all of it.
        first, count, _ = tokens[-1].runs[-1]
        ids = tuple(tokens[-1].ids[: first + count].tolist())
        first = max(first, 1)  # nothing predicts the first token of all
        yield sample, GivenAnswer(ids, first) if first < len(ids) else None
