"""Evaluations of a run, as their files tell them: scores, comparisons, and rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.evaluate.report.shapes import (
    decoded,
    mapping_of,
    mappings_in,
    number_of,
    text_of,
    texts_in,
)
from tunesmith.evaluate.scores import Comparison, Score

MOST_ROWS = 50_000
"""Rows that are read of one evaluation; a page could not say more of more."""

HEADLINES = ("accuracy", "correction_f05", "code_pass", "json_field_accuracy")
"""Metrics that say whether answers are right, where a data set has them."""

BY_THE_WAY = (
    *("stop", "repeat", "tokens", "length", "loss", "perplexity", "invalid", "llamafactory"),
    *("token_accuracy", "general"),
)
"""Parts of the names of metrics that tell how answers are, not whether they are right."""


ENOUGH_ROWS = 20
"""With fewer, intervals are too narrow to stand in a headline."""


@dataclass(frozen=True)
class Answer:
    """What one model answered to a row.

    Args:
        text: of the answer.
        loss: of the row's own answer, in nats a token; None if it was not measured.
        scores: of the row alone, by metric.
    """

    text: str
    loss: float | None
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """A row with the answers of both models.

    Args:
        where: file and line.
        prompt: as rendered; what there is if `messages` is empty.
        messages: before the answer.
        label: the data's own answer.
        before: of the model it is compared with.
        after: of the tuned model.
    """

    where: str
    prompt: str
    messages: tuple[Mapping[str, Any], ...]
    label: str | None
    before: Answer | None
    after: Answer | None


@dataclass(frozen=True)
class Model:
    """One model of an evaluation with its scores, by metric."""

    role: str
    name: str
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run.

    Args:
        name: of its folder.
        created: when, in ISO's form.
        command: that made it.
        data: label, number of rows and fingerprint of what was asked.
        models: with their scores.
        comparisons: after against before, by metric.
        effect: how far the tuned model is from the one before.
        notes: for people.
        rows: with both answers.
    """

    name: str
    created: str
    command: str
    data: Mapping[str, Any]
    models: tuple[Model, ...]
    comparisons: Mapping[str, Comparison]
    effect: Mapping[str, float]
    notes: tuple[str, ...]
    rows: tuple[Row, ...]

    def model(self, role: str) -> Model | None:
        """The model `before` or `after`."""
        return next((model for model in self.models if model.role == role), None)

    @property
    def label(self) -> str:
        """What the rows are called."""
        return str(self.data.get("label") or self.name)

    @property
    def num_rows(self) -> int:
        """How many rows were asked."""
        return int(number_of(self.data.get("rows")) or len(self.rows))

    @property
    def headline(self) -> str | None:
        """The metric that tells best whether answers are right."""
        after = self.model("after")
        known = [
            name
            for name, score in (after.scores if after else {}).items()
            if score.better != "neither"
        ]
        compared = [name for name in known if name in self.comparisons]
        names = compared or known
        best = (name for name in HEADLINES if name in names)
        main = (name for name in names if not any(part in name.lower() for part in BY_THE_WAY))
        return next(best, next(main, names[0] if names else None))


def read_evaluations(folder: Path) -> Iterator[Evaluation]:
    """The evaluations under a folder, the newest first; what cannot be read is left out."""
    found: list[Evaluation] = []
    for file in sorted(folder.glob("*/evaluation.json")):
        try:
            about = mapping_of(decoded(file.read_text(encoding="utf-8", errors="replace")))
        except OSError:
            continue
        found.append(_evaluation(file.parent, about))
    yield from sorted(found, key=lambda each: each.created, reverse=True)


def _evaluation(folder: Path, about: dict[str, Any]) -> Evaluation:
    pairs = (_comparison(each) for each in mappings_in(about.get("comparisons")))
    effect = {
        name: value
        for name, raw in mapping_of(about.get("effect")).items()
        if (value := number_of(raw)) is not None
    }
    return Evaluation(
        name=folder.name,
        created=text_of(about.get("created")),
        command=text_of(about.get("command")),
        data=mapping_of(about.get("data")),
        models=tuple(_model(each) for each in mappings_in(about.get("models"))),
        comparisons={each.metric: each for each in pairs if each is not None},
        effect=effect,
        notes=tuple(texts_in(about.get("notes"))),
        rows=tuple(_rows(folder / "rows.jsonl")),
    )


def _model(about: dict[str, Any]) -> Model:
    scores: dict[str, Score] = {}
    for name, raw in mapping_of(about.get("scores")).items():
        score = _score(name, mapping_of(raw))
        if score is not None:
            scores[name] = score
    return Model(text_of(about.get("role")), text_of(about.get("name")), scores)


def _score(name: str, about: dict[str, Any]) -> Score | None:
    value, better = number_of(about.get("value")), about.get("better")
    if value is None:
        return None
    return Score(
        name=name,
        value=value,
        signature=text_of(about.get("signature")),
        better=better if better in ("higher", "lower") else "neither",
        num_rows=int(number_of(about.get("num_rows")) or 0),
        low=number_of(about.get("low")),
        high=number_of(about.get("high")),
    )


def _comparison(about: dict[str, Any]) -> Comparison | None:
    names = ("before", "after", "low", "high", "p_value")
    values = [number_of(about.get(name)) for name in names]
    before, after, low, high, p_value = values
    verdict = about.get("verdict")
    if before is None or after is None or not text_of(about.get("metric")):
        return None
    return Comparison(
        metric=text_of(about.get("metric")),
        before=before,
        after=after,
        low=after - before if low is None else low,
        high=after - before if high is None else high,
        p_value=1.0 if p_value is None else p_value,
        test=text_of(about.get("test")),
        verdict=verdict if verdict in ("better", "worse") else "no clear difference",
    )


def _rows(file: Path) -> Iterator[Row]:
    """The rows of a file, a torn last one left out."""
    for row in read_lines(file, MOST_ROWS):
        label = row.get("label")
        yield Row(
            where=place_of(row),
            prompt=text_of(row.get("prompt")),
            messages=tuple(mappings_in(row.get("messages"))),
            label=label if isinstance(label, str) else None,
            before=_answer(row.get("before")),
            after=_answer(row.get("after")),
        )


def place_of(row: Mapping[str, Any]) -> str:
    """Where a row is: its origin, or its file and line."""
    origin = text_of(row.get("origin"))
    line = number_of(row.get("line"))
    path = text_of(row.get("path"))
    return origin or (f"{path}:{line:.0f}" if line is not None else path)


def _answer(value: object) -> Answer | None:
    about = mapping_of(value)
    if not about:
        return None
    scores = {
        name: score
        for name, raw in mapping_of(about.get("scores")).items()
        if (score := number_of(raw)) is not None
    }
    return Answer(text_of(about.get("prediction")), number_of(about.get("loss")), scores)


def read_lines(file: Path, most: int) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines; torn or foreign lines are skipped."""
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for _, line in zip(range(most), lines, strict=False):
                found = mapping_of(decoded(line))
                if found:
                    yield found
    except OSError:
        return


def newest_with(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The newest evaluation; if there is one, beside the base and on enough rows."""
    said = [each for each in evaluations if each.models or each.rows]
    of_training = [each for each in said if each.effect and each.num_rows >= ENOUGH_ROWS]
    return next(iter([*of_training, *(each for each in said if each.num_rows), *said]), None)
