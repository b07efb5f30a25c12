"""Scores of the rows of a data file, by a reward model or a classifier.

Shape letters: S sequences, C labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tunesmith.config.recipe import DataConfig
from tunesmith.data.columns import read_samples
from tunesmith.data.encode import Pipeline
from tunesmith.data.readers import read_rows
from tunesmith.data.shapes import SHAPES, MistakeError
from tunesmith.data.shapes.known import columns_of
from tunesmith.data.shapes.labeled import content_of, label_of
from tunesmith.data.sources import Source
from tunesmith.data.templates import build_renderer
from tunesmith.errors import DataError, Problem
from tunesmith.evaluate.metrics.classification import ClassReport, class_report
from tunesmith.evaluate.metrics.labels import classify_probabilities
from tunesmith.evaluate.scores import Score
from tunesmith.infer.score_model import ScoreModel
from tunesmith.types import (
    Conversation,
    Json,
    Labeled,
    Origin,
    Preference,
    Rated,
    Reporter,
    Sample,
    Text,
)

NO_LABEL = ""
"""The label of a row that has none."""


@dataclass(frozen=True)
class ScoredRow:
    """One row of the data with its scores.

    Args:
        origin: where it is.
        text: its beginning, for people.
        values: what `scores.jsonl` says of it besides its line.
    """

    origin: Origin
    text: str
    values: dict[str, Json] = field(default_factory=dict[str, Json])

    def as_json(self) -> dict[str, Json]:
        """A line of `scores.jsonl`."""
        return {"path": self.origin.path, "line": self.origin.line, **self.values}


def score_sources(
    scorer: ScoreModel, sources: Sequence[Source], data: DataConfig, reporter: Reporter
) -> list[ScoredRow]:
    """Scores all rows.

    A reward model gives both sides of a preference pair a score, any other row one; a classifier
    gives each text or conversation a label and the probabilities of all.

    Args:
        scorer: the model.
        sources: the data.
        data: how it is rendered: the template and its arguments.
        reporter: shows bars.

    Raises:
        DataError: rows are wrong.
    """
    samples = list(_read(scorer, sources, reporter))
    problems = [sample for sample in samples if isinstance(sample, Problem)]
    if not samples:
        place = str(sources[0].files[0]) if sources and sources[0].files else "data"
        problems = [Problem(place, "data.empty-file", "no rows", "at least one row")]
    if problems:
        raise DataError(problems, num_problems=len(problems))
    arguments = {**scorer.template_arguments, **data.template_arguments}
    data = data.model_copy(update={"template_arguments": arguments})
    renderer, _ = build_renderer(scorer.tokenizer, data, None)
    own = [_to_score(sample) for sample in samples if not isinstance(sample, Problem)]
    pairs = list(_tokens(Pipeline(renderer), own))
    flat = [ids for _, sequences in pairs for ids in sequences]
    scores = iter(scorer.scores(flat, reporter=reporter).tolist())
    return [_row(scorer, sample, [next(scores) for _ in sequences]) for sample, sequences in pairs]


def summary(rows: Sequence[ScoredRow]) -> dict[str, float]:
    """Means over the rows, by name."""
    of_pairs = [row.values for row in rows if "rejected" in row.values]
    of_scores = [float(str(row.values["score"])) for row in rows if "score" in row.values]
    found: dict[str, float] = {"rows": len(rows)}
    if of_pairs:
        chosen, rejected = (
            [float(str(values[side])) for values in of_pairs] for side in ("chosen", "rejected")
        )
        margins = [high - low for high, low in zip(chosen, rejected, strict=True)]
        found["accuracy"] = sum(margin > 0 for margin in margins) / len(margins)
        found["margin"] = sum(margins) / len(margins)
        found["chosen_score"] = sum(chosen) / len(chosen)
        found["rejected_score"] = sum(rejected) / len(rejected)
    if of_scores:
        found["score"] = sum(of_scores) / len(of_scores)
    return found | {score.name: score.value for score in class_scores(rows)}


def class_scores(rows: Sequence[ScoredRow]) -> list[Score]:
    """A classifier's figures on the rows that have a label, with 95 % intervals.

    Those of OpenAI's compute_classification_metrics and of scikit-learn: accuracy, weighted and
    macro F1; of two labels also precision, recall, F1, AUROC and AUPRC.
    """
    named = [row.values for row in rows if "expected" in row.values]
    if not named:
        return []
    found = classify_probabilities(
        [str(values["expected"]) for values in named],
        [_chances(values) for values in named],
    )
    return [each.score() for each in found if each.name != "invalid"]


def class_table(rows: Sequence[ScoredRow]) -> ClassReport | None:
    """A classifier's figures by label; None without a row that has one."""
    named = [row.values for row in rows if "expected" in row.values]
    if not named:
        return None
    real, answered = ([str(values[key]) for values in named] for key in ("expected", "label"))
    # A label that the classifier does not know can only be got wrong.
    return class_report(real, answered, list(dict.fromkeys([*_chances(named[0]), *real])))


def _chances(values: dict[str, Json]) -> dict[str, float]:
    found = values["probabilities"]
    items = found.items() if isinstance(found, dict) else ()
    return {label: float(str(chance)) for label, chance in items}


def _read(
    scorer: ScoreModel, sources: Sequence[Source], reporter: Reporter
) -> Iterator[Sample | Problem]:
    for source in sources:
        rows = _read_labeled(source) if scorer.labels else read_samples(source.config, source.files)
        yield from reporter.track(f"Reading {source.config.label}", rows)


def _read_labeled(source: Source) -> Iterator[Labeled | Problem]:
    """Texts and conversations, with their labels where they have one."""
    config, shape = source.config, SHAPES["labeled"]
    for file in source.files:
        for row in read_rows(file, encoding=config.encoding, sheet=config.sheet):
            if isinstance(row.value, Problem):
                yield row.value
                continue
            value = row.value
            names = columns_of(shape, value, config.columns, with_aliases=True)
            canonical = {name: value[actual] for name, actual in names.items() if actual in value}
            try:
                has_label = canonical.get("label") is not None
                label = label_of(canonical["label"]) if has_label else NO_LABEL
                yield Labeled(content_of(canonical, row.origin), label)
            except MistakeError as mistake:
                place = str(row.origin)
                yield Problem(place, mistake.code, mistake.found, mistake.expected)


def _to_score(sample: Sample) -> Sample:
    """Raw text is scored as it is, without the end that training on it would add."""
    return Labeled(sample, NO_LABEL) if isinstance(sample, Text) else sample


def _tokens(
    pipeline: Pipeline, samples: Sequence[Sample]
) -> Iterator[tuple[Sample, list[list[int]]]]:
    """Each sample with the ids to score: of a pair both sides, else one sequence.

    Raises:
        DataError: a sample cannot be rendered, or has nothing to score.
    """
    for sample, tokens in pipeline.tokens_of(samples):
        if isinstance(tokens, Problem):
            raise DataError([tokens])
        is_pair = isinstance(sample, Preference)
        if not tokens or (is_pair and len(tokens) != 2):
            found = f"{len(tokens)} sequences" if tokens else "no answer"
            problem = Problem(str(sample.origin), "data.no-score", found, "something to score")
            raise DataError([problem])
        # Of a conversation in several sequences the last one ends with its last answer.
        yield sample, [each.ids.tolist() for each in (tokens if is_pair else tokens[-1:])]


def _row(scorer: ScoreModel, sample: Sample, scores: Sequence[Sequence[float]]) -> ScoredRow:
    values: dict[str, Json] = {}
    if scorer.labels and isinstance(sample, Labeled):
        chances = _softmax(scores[0])
        best = max(range(len(chances)), key=lambda number: chances[number])
        values["label"] = scorer.labels[best]
        if sample.label != NO_LABEL:
            values["expected"] = sample.label
        values["probabilities"] = dict(zip(scorer.labels, chances, strict=True))
    elif isinstance(sample, Preference):
        (chosen,), (rejected,) = scores
        values |= {"chosen": chosen, "rejected": rejected, "right": chosen > rejected}
    else:
        values["score"] = scores[0][0]
    return ScoredRow(sample.origin, _text_of(sample), values)


def _softmax(logits: Sequence[float]) -> list[float]:
    highest = max(logits)
    powers = [math.exp(logit - highest) for logit in logits]
    return [power / sum(powers) for power in powers]


def _text_of(sample: Sample) -> str:
    """The beginning of what a row is about."""
    match sample:
        case Labeled():
            return _text_of(sample.content)
        case Rated():
            return _text_of(sample.conversation)
        case Text():
            return sample.text
        case Conversation():
            return sample.messages[-1].content or ""
        case Preference():
            return sample.prompt[-1].content or ""
        case _:
            return sample.completion
