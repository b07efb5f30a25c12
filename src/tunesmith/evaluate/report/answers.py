"""Answers before and after: which rows became right or wrong, and what differs in them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.evaluate.report.diff import Piece, compare_texts, cut_pieces
from tunesmith.evaluate.report.evaluations import Answer, Evaluation, Row, place_of
from tunesmith.evaluate.report.reading import RunRecord
from tunesmith.evaluate.report.shapes import mappings_in, number_of, numbers_in, text_of
from tunesmith.evaluate.report.wording import clean, figure, metric_name

Kind = Literal["broken", "fixed", "worse", "better", "wrong", "right", "same"]

KINDS: dict[str, str] = {
    "broken": "right before, wrong after",
    "fixed": "wrong before, right after",
    "worse": "a lower score than before",
    "better": "a higher score than before",
    "wrong": "wrong both times",
    "right": "right both times",
    "same": "the same score both times",
}
"""In the order in which they are shown: what flipped comes first."""

MOST_SHOWN = {"broken": 10, "fixed": 10, "worse": 8, "better": 8, "wrong": 5, "right": 3, "same": 3}
SHOWN_CHARACTERS = 600
MOST_CHARACTERS = 6_000
"""Of a text: as many are shown, as many behind `more`."""

EQUAL = 1e-9
RIGHT = 0.999
RIGHT_METRICS = ("exact_match", "accuracy", "code_pass")
"""Metrics whose rows are 0 or 1: wrong or right."""


@dataclass(frozen=True)
class Passage:
    """A text cut for showing.

    Args:
        shown: the first pieces.
        hidden: behind `more`.
        num_left_out: characters that are not in the page.
    """

    shown: tuple[Piece, ...]
    hidden: tuple[Piece, ...]
    num_left_out: int = 0


@dataclass(frozen=True)
class ShownRow:
    """A row ready for the page."""

    where: str
    question: Passage
    context: Passage | None
    label: Passage | None
    before: Passage | None
    after: Passage | None
    facts: str


@dataclass(frozen=True)
class Group:
    """Rows of one kind: how many there are, and some of them."""

    kind: str
    about: str
    count: int
    rows: tuple[ShownRow, ...]


@dataclass(frozen=True)
class AnswerTable:
    """Rows of an evaluation by what became of them.

    Args:
        measure: what decides it.
        num_rows: in all.
        groups: of rows, what flipped first.
        hardest: rows that the tuned model is worst at.
        most_improved: rows that gained most.
    """

    measure: str
    num_rows: int
    groups: tuple[Group, ...]
    hardest: tuple[ShownRow, ...]
    most_improved: tuple[ShownRow, ...]


def answer_table(evaluation: Evaluation) -> AnswerTable | None:
    """Sorts the rows of an evaluation; None if it has no rows with answers."""
    rows = [row for row in evaluation.rows if row.after is not None]
    if not rows:
        return None
    metric = row_metric(evaluation, rows)
    groups: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    if any(row.before for row in rows):
        for row in rows:
            groups[kind_of(row, metric, evaluation)].append(row)
    shown = tuple(
        Group(kind, about, len(groups[kind]), _shown(groups[kind][: MOST_SHOWN[kind]], metric))
        for kind, about in KINDS.items()
        if groups[kind]
    )
    harder, improved = _by_difficulty(rows, evaluation), _by_gain(rows, evaluation)
    return AnswerTable(
        measure=metric_name(metric) if metric else "equal to the data's answer",
        num_rows=len(rows),
        groups=shown,
        hardest=_shown(harder[:5], metric),
        most_improved=_shown(improved[:5], metric),
    )


def row_metric(evaluation: Evaluation, rows: Sequence[Row]) -> str | None:
    """The metric of single rows that tells right from wrong; None compares the texts."""
    known = {name for row in rows if row.after for name in row.after.scores}
    exact = next((name for name in RIGHT_METRICS if name in known), None)
    if any(is_right(each, row, exact) for row in rows for each in (row.before, row.after)):
        return exact
    headline = evaluation.headline
    return headline if headline in known else exact


def is_right(answer: Answer | None, row: Row, metric: str | None) -> bool:
    """Whether an answer is the right one."""
    if answer is None:
        return False
    if metric is not None:
        return answer.scores.get(metric, 0.0) >= RIGHT
    return row.label is not None and _plain(answer.text) == _plain(row.label)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).strip()


def kind_of(row: Row, metric: str | None, evaluation: Evaluation) -> Kind:
    """What became of a row."""
    if metric is None or metric in RIGHT_METRICS:
        before, after = (is_right(each, row, metric) for each in (row.before, row.after))
        if before == after:
            return "right" if after else "wrong"
        return "fixed" if after else "broken"
    gain = _gain(row, metric, evaluation)
    if gain is None or abs(gain) < EQUAL:
        return "same"
    return "better" if gain > 0 else "worse"


def _gain(row: Row, metric: str, evaluation: Evaluation) -> float | None:
    """How much better the score of a row is than before."""
    before = row.before.scores.get(metric) if row.before else None
    after = row.after.scores.get(metric) if row.after else None
    if before is None or after is None:
        return None
    return (before - after) if _is_lower_better(metric, evaluation) else (after - before)


def _is_lower_better(metric: str, evaluation: Evaluation) -> bool:
    model = evaluation.model("after")
    score = model.scores.get(metric) if model else None
    return score is not None and score.better == "lower"


def _by_difficulty(rows: Sequence[Row], evaluation: Evaluation) -> list[Row]:
    """Rows the tuned model finds least likely; by the headline's score where no loss is known."""
    with_loss = [(row.after.loss, row) for row in rows if row.after and row.after.loss is not None]
    if with_loss:
        return [row for _, row in sorted(with_loss, key=lambda pair: -pair[0])]
    metric = evaluation.headline or ""
    sign = -1.0 if _is_lower_better(metric, evaluation) else 1.0
    scored = [
        (sign * row.after.scores[metric], row)
        for row in rows
        if row.after and metric in row.after.scores and not is_right(row.after, row, None)
    ]
    return [row for _, row in sorted(scored, key=lambda pair: pair[0])]


def _by_gain(rows: Sequence[Row], evaluation: Evaluation) -> list[Row]:
    """Rows whose score, or whose loss, got better most."""
    gains: list[tuple[float, Row]] = []
    for row in rows:
        gain = _gain(row, evaluation.headline or "", evaluation)
        before, after = (each.loss if each else None for each in (row.before, row.after))
        drop = before - after if before is not None and after is not None else 0.0
        gains.append(((gain or 0.0) + drop / 1e3 if gain is not None else drop, row))
    return [row for gain, row in sorted(gains, key=lambda pair: -pair[0]) if gain > EQUAL]


def _shown(rows: Iterable[Row], metric: str | None) -> tuple[ShownRow, ...]:
    return tuple(shown_row(row, metric) for row in rows)


def shown_row(row: Row, metric: str | None) -> ShownRow:
    """Cuts a row's texts and marks what differs, but for spaces around them."""
    question, context = asked(row)
    label = None if row.label is None else clean(row.label).strip()
    before = clean(row.before.text).strip() if row.before else None
    after = clean(row.after.text).strip() if row.after else None
    return ShownRow(
        where=clean(row.where),
        question=plain_passage(question),
        context=plain_passage(context) if context else None,
        label=None if label is None else plain_passage(label),
        before=None if before is None else passage(compare_texts(before, label)),
        after=None if after is None else passage(compare_texts(after, label, before)),
        facts=_facts(row, metric),
    )


def _facts(row: Row, metric: str | None) -> str:
    """Loss and score of a row, before and after."""
    parts: list[str] = []
    pairs = [("loss", *(each.loss if each else None for each in (row.before, row.after)))]
    if metric is not None:
        scores = (each.scores.get(metric) if each else None for each in (row.before, row.after))
        pairs.insert(0, (metric_name(metric), *scores))
    for name, before, after in pairs:
        if after is not None:
            change = f"{before:.3g} → " if before is not None else ""
            parts.append(f"{name} {change}{after:.3g}")
    return " · ".join(parts)


def asked(row: Row) -> tuple[str, str]:
    """The last message of the user, and what stands before it."""
    if not row.messages:
        return spoken(row.prompt)
    texts = [content_of(message) for message in row.messages]
    earlier = [
        f"{message.get('role', '')}: {text}"
        for message, text in zip(row.messages[:-1], texts[:-1], strict=True)
    ]
    return clean(texts[-1]), clean("\n".join(earlier))


MARKS = re.compile(r"<\|[^|<>]*\|>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|</?s>")
ROLE = re.compile(r"\s*(?:system|user|human|assistant|model)\s*(?:\n|$)", re.IGNORECASE)


def spoken(prompt: str) -> tuple[str, str]:
    """Of a rendered prompt the last turn and those before it, without a template's marks."""
    if not MARKS.search(prompt):
        return clean(prompt), ""
    turns = [ROLE.sub("", part, count=1).strip() for part in MARKS.split(prompt)]
    turns = [turn for turn in turns if turn] or [prompt]
    return clean(turns[-1]), clean("\n".join(turns[:-1]))


def content_of(message: Mapping[str, Any]) -> str:
    """A message's text; of several parts, their texts."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(text_of(part.get("text")) for part in mappings_in(content))


def plain_passage(text: str) -> Passage:
    """A cleaned text without marks."""
    return passage([Piece(text)] if text else [])


def passage(pieces: Sequence[Piece]) -> Passage:
    """Cuts pieces for showing."""
    shown, rest = cut_pieces(pieces, SHOWN_CHARACTERS)
    if sum(len(piece.text) for piece in rest) <= SHOWN_CHARACTERS // 10:
        return Passage(tuple(pieces), ())  # a fold for half a line would be silly
    hidden, left_out = cut_pieces(rest, MOST_CHARACTERS - SHOWN_CHARACTERS)
    return Passage(tuple(shown), tuple(hidden), sum(len(piece.text) for piece in left_out))


# Files of the training itself


def sample_rows(run: RunRecord) -> tuple[ShownRow, ...]:
    """The answers to a few prompts before training and at the end, where no evaluation has them."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for line in run.answers:
        step = number_of(line.get("step"))
        if step is not None:
            key = (place_of(line), text_of(line.get("prompt")))
            found.setdefault(key, {})[int(step)] = line
    rows: list[Row] = []
    for (where, prompt), by_step in list(found.items())[:12]:
        first, last = by_step.get(0), by_step[max(by_step)]
        label = last.get("label")
        rows.append(
            Row(
                where,
                prompt,
                tuple(mappings_in(last.get("messages"))),
                label if isinstance(label, str) else None,
                Answer(text_of(first.get("answer")), None, {}) if first else None,
                Answer(text_of(last.get("answer")), None, {}) if last is not first else None,
            )
        )
    return _shown(rows, None)


@dataclass(frozen=True)
class HardSample:
    """A training row with a high loss: perhaps its label is wrong."""

    where: str
    facts: str
    question: Passage
    answer: Passage


MOST_HARD = 12


def hard_samples(run: RunRecord) -> tuple[HardSample, ...]:
    """The training rows with the highest loss in the last epoch."""
    rows = list(mappings_in(run.losses.get("rows")))[:MOST_HARD]
    return tuple(
        HardSample(
            where=clean(place_of(row)),
            facts=_hard_facts(row),
            question=plain_passage(spoken(text_of(row.get("prompt")))[0]),
            answer=plain_passage(clean(text_of(row.get("label")) or text_of(row.get("answer")))),
        )
        for row in rows
    )


def _hard_facts(row: Mapping[str, Any]) -> str:
    """A row's losses by epoch, and its length."""
    losses = " → ".join(figure(loss) for loss in numbers_in(row.get("epochs")))
    tokens = number_of(row.get("tokens"))
    return f"loss by epoch: {losses}" + (f"; {tokens:,.0f} tokens" if tokens else "")
