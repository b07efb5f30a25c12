"""What metrics find: a number with its interval, its signature, and the rows it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one model on one data set.

    Args:
        name: of the metric.
        value: shares and F-scores from 0 to 1, BLEU, chrF and ROUGE from 0 to 100, losses in nats.
        signature: everything that changes the number: tokenizer, smoothing, library and version.
        better: the direction.
        num_rows: that it is made of.
        low: of the 95 % interval over rows, Wilson's for shares of rows that are right or wrong,
            by bootstrap else; None if it has none.
        high: of the same.
        rows: the metric of each row alone, None where a row has none; empty if it has no such.
    """

    name: str
    value: float
    signature: str
    better: Better
    num_rows: int
    low: float | None = None
    high: float | None = None
    rows: tuple[float | None, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Without the rows, which stand in a file of their own."""
        found = asdict(self)
        del found["rows"]
        return found


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same rows.

    Args:
        metric: its name.
        before: the first model's value.
        after: the second's.
        low: of the 95 % interval of `after - before`.
        high: of the same.
        p_value: of the test that they are equal, two-sided.
        test: its name and settings.
        verdict: what can be said at 5 %.
    """

    metric: str
    before: float
    after: float
    low: float
    high: float
    p_value: float
    test: str
    verdict: Literal["better", "worse", "no clear difference"]

    def as_json(self) -> dict[str, Any]:
        """For evaluation.json."""
        return asdict(self)


def by_name(scores: Sequence[Score]) -> dict[str, Score]:
    """Scores by their names."""
    return {score.name: score for score in scores}
