"""The metrics of an evaluation as a table: values, intervals as small pictures, verdicts."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.evaluate.report.evaluations import Evaluation
from tunesmith.evaluate.report.wording import figure, metric_name, p_value, signed
from tunesmith.evaluate.scores import Comparison, Score


@dataclass(frozen=True)
class Bar:
    """An interval on a line, in percent of its length: from, to, and the value."""

    low: float
    high: float
    value: float


@dataclass(frozen=True)
class MetricRow:
    """A metric before and after."""

    name: str
    arrow: str
    signature: str
    before: str
    before_interval: str
    after: str
    after_interval: str
    change: str
    certainty: str
    verdict: str
    before_bar: Bar | None
    after_bar: Bar | None


def metric_rows(evaluation: Evaluation) -> list[MetricRow]:
    """All metrics, in the order of the evaluation; the headline first."""
    before, after = (evaluation.model(role) for role in ("before", "after"))
    scores = dict(after.scores) if after else {}
    old = dict(before.scores) if before else {}
    names = sorted({**scores, **old}, key=[*scores, *old].index)
    names.sort(key=lambda name: name != evaluation.headline)
    return [
        _row(name, old.get(name), scores.get(name), evaluation.comparisons.get(name))
        for name in names
    ]


def _row(
    name: str, before: Score | None, after: Score | None, compared: Comparison | None
) -> MetricRow:
    any_score = after or before
    low, high = _range([each for each in (before, after) if each is not None])
    certainty = ""
    if compared is not None:
        certainty = (
            f"{signed(compared.low)} to {signed(compared.high)}, {p_value(compared.p_value)}"
        )
    change = ""
    if before is not None and after is not None:
        change = signed(after.value - before.value)
    return MetricRow(
        name=metric_name(name),
        arrow={"higher": "↑", "lower": "↓"}.get(any_score.better if any_score else "", ""),
        signature=any_score.signature if any_score else "",
        before=figure(before.value) if before else "–",
        before_interval=_interval(before),
        after=figure(after.value) if after else "–",
        after_interval=_interval(after),
        change=change,
        certainty=certainty,
        verdict=compared.verdict if compared else "",
        before_bar=_bar(before, low, high),
        after_bar=_bar(after, low, high),
    )


def _interval(score: Score | None) -> str:
    if score is None or score.low is None or score.high is None:
        return ""
    return f"{figure(score.low)}–{figure(score.high)}"


def _range(scores: list[Score]) -> tuple[float, float]:
    """Ends of the line on which both intervals are drawn."""
    ends = [each for s in scores for each in (s.low, s.high, s.value) if each is not None]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _bar(score: Score | None, low: float, high: float) -> Bar | None:
    if score is None:
        return None

    def place(value: float | None) -> float:
        return round(100 * ((score.value if value is None else value) - low) / (high - low), 2)

    return Bar(place(score.low), place(score.high), place(score.value))
