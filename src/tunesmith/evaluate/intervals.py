"""How sure a figure is: intervals by resampling rows, and tests of two models on the same rows.

A metric that can be resampled is a `Measured`: a function of how often every row counts. Resampling
rows with replacement (the percentile bootstrap) then is one call with a matrix of counts, and two
models are resampled with the same counts, so that rows that are hard for both cancel out.

Not covered: rows that hang together (several questions about one text); intervals and p-values take
rows to be independent. With fewer than 20 rows percentile intervals are too narrow.

Shape letters: B resamples, R rows, K statistics of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import EvaluationError
from tunesmith.evaluate.scores import Better, Comparison, Score

Floats = NDArray[np.float64]

RESAMPLES = 2000
"""The ends of a 95 % interval then move by about 2 % of its width from seed to seed."""

BLOCK_CELLS = 2_000_000
"""Counts are made for so many resampled rows at a time: 16 MB."""

SIGNIFICANCE = 0.05

Z_95 = 1.959963984540054
"""Standard errors to either side that hold 95 % of a normal distribution."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One metric of one model, in a form that can be resampled.

    Args:
        name: of the metric.
        signature: everything that changes the number.
        better: the direction.
        at: `weight_BR -> value_B`, the metric with each row counted so many times.
        rows: the metric of each row alone, None where a row has none.
        num_rows: rows that count.
        is_share: whether the metric is the mean of `rows`, and each of these is 0 or 1.
    """

    name: str
    signature: str
    better: Better
    at: Callable[[Floats], Floats]
    rows: tuple[float | None, ...]
    num_rows: int
    is_share: bool = False

    @property
    def value(self) -> float:
        """The metric over all rows, each counted once."""
        return float(self.at(np.ones((1, len(self.rows))))[0])

    def score(self, *, resamples: int = RESAMPLES, seed: int = 0) -> Score:
        """The figure with its 95 % interval."""
        low, high = interval(self, resamples=resamples, seed=seed)
        has_rows = any(row is not None for row in self.rows)
        rows = self.rows if has_rows else ()
        signature = f"{self.name}|{self.signature}"
        return Score(self.name, self.value, signature, self.better, self.num_rows, low, high, rows)


def mean_of(
    name: str, rows: Sequence[float | None], *, signature: str, better: Better = "higher"
) -> Measured:
    """A metric that is the mean of what rows have."""
    given = np.array([0.0 if row is None else row for row in rows], dtype=np.float64)
    has_value = np.array([row is not None for row in rows], dtype=np.float64)
    stats_RK = np.stack([given, has_value], axis=1)

    def of_sums(sums_BK: Floats) -> Floats:
        return ratio(sums_BK[:, 0], sums_BK[:, 1])

    return from_sums(name, stats_RK, of_sums, rows=rows, signature=signature, better=better)


def share_of(
    name: str, rows: Sequence[bool | None], *, signature: str, better: Better = "higher"
) -> Measured:
    """A metric that is the share of rows of which something is true; None does not count."""
    numbers = [None if row is None else float(row) for row in rows]
    mean = mean_of(name, numbers, signature=signature, better=better)
    return replace(mean, is_share=True)


def from_sums(
    name: str,
    stats_RK: Floats,
    of_sums: Callable[[Floats], Floats],
    *,
    rows: Sequence[float | None],
    signature: str,
    better: Better = "higher",
    num_rows: int | None = None,
) -> Measured:
    """A metric of a whole corpus: a function of the sums of what is counted in each row.

    Args:
        name: of the metric.
        stats_RK: what is counted; zeros in rows that do not count.
        of_sums: `sums_BK -> value_B`.
        rows: the metric of each row alone, None where a row has none.
        signature: everything that changes the number.
        better: the direction.
        num_rows: rows that count; those that have a metric alone, if left out.
    """

    def at(weight_BR: Floats) -> Floats:
        return of_sums(weight_BR @ stats_RK)

    if num_rows is None:
        num_rows = sum(row is not None for row in rows) or len(rows)
    return Measured(name, signature, better, at, tuple(rows), num_rows)


def measured(score: Score) -> Measured:
    """A score that is the mean of its rows, in the form that can be compared.

    Raises:
        EvaluationError: it is none (`evaluate.unpaired`).
    """
    rows = [row for row in score.rows if row is not None]
    if not rows or not math.isclose(math.fsum(rows) / len(rows), score.value):
        raise EvaluationError(
            "evaluate.unpaired",
            score.name,
            found="a figure of a whole corpus, without its counts",
            expected="one that is the mean of its rows",
            try_="metrics.compare_predictions, which keeps the counts",
        )
    signature = score.signature.removeprefix(f"{score.name}|")
    mean = mean_of(score.name, score.rows, signature=signature, better=score.better)
    return replace(mean, is_share=set(rows) <= {0.0, 1.0})


def ratio(above: Floats, below: Floats, empty: float = math.nan) -> Floats:
    """`above / below`, and `empty` where there is nothing below."""
    return np.divide(above, below, out=np.full_like(above, empty, dtype=float), where=below != 0)


def interval(
    measured: Measured, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float | None, float | None]:
    """The 95 % interval: Wilson's for a share of rows, by percentiles of resamples for the rest.

    Wilson's, since the bootstrap calls 0 right of 20 rows certain: from 0 to 0.
    """
    if measured.num_rows < 2:
        return None, None
    if measured.is_share:
        return wilson(sum(row or 0.0 for row in measured.rows), measured.num_rows)
    values_B = _resampled(measured, resamples, seed)
    return _percentiles(values_B)


def wilson(hits: float, num_rows: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share (doi:10.2307/2276774)."""
    z2 = Z_95**2
    share = hits / num_rows
    center = (share + z2 / (2 * num_rows)) / (1 + z2 / num_rows)
    spread = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * num_rows)) / num_rows)
    half = spread / (1 + z2 / num_rows)
    return max(0.0, center - half), min(1.0, center + half)


def compare(
    before: Measured, after: Measured, *, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """What can be said about two models on the same rows in the same order.

    Rows that are right or wrong are tested by McNemar's exact test, all others by the paired
    bootstrap: the share of resampled differences, moved to a mean of 0, that are at least as far
    out as the one found (Riezler and Maxwell, W05-0908).

    Raises:
        EvaluationError: the two are not the same metric of as many rows (`evaluate.unpaired`).
    """
    _check_paired(before, after)
    found = after.value - before.value
    difference_B = _resampled(after, resamples, seed) - _resampled(before, resamples, seed)
    difference_B = difference_B[np.isfinite(difference_B)]
    low, high = _percentiles(difference_B)
    if before.is_share and after.is_share:
        p_value, test = mcnemar(before.rows, after.rows), "mcnemar-exact"
    else:
        p_value = _bootstrap_p(found, difference_B, min(before.num_rows, after.num_rows))
        test = f"paired-bootstrap|n:{resamples}|seed:{seed}"
    return Comparison(
        metric=before.name,
        before=before.value,
        after=after.value,
        low=math.nan if low is None else low,
        high=math.nan if high is None else high,
        p_value=p_value,
        test=test,
        verdict=verdict(found, p_value, before.better),
    )


def verdict(
    difference: float, p_value: float, better: Better
) -> Literal["better", "worse", "no clear difference"]:
    """What a difference means at 5 %."""
    is_clear = p_value < SIGNIFICANCE and difference != 0 and better != "neither"
    if not is_clear:
        return "no clear difference"
    return "better" if (difference > 0) == (better == "higher") else "worse"


def mcnemar(before: Sequence[float | None], after: Sequence[float | None]) -> float:
    """McNemar's exact test, two-sided: only rows that one model has right and the other wrong."""
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    return sign_test(sum(b > a for a, b in pairs), sum(a > b for a, b in pairs))


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p-value of so many wins and losses, were both as likely."""
    total, fewer = wins + losses, min(wins, losses)
    if wins == losses:
        return 1.0
    ways, count = 0, 1
    for chosen in range(fewer + 1):
        ways += count
        count = count * (total - chosen) // (chosen + 1)
    return min(1.0, 2 * ways / 2**total)


def counts(num_rows: int, *, resamples: int, seed: int) -> Iterator[Floats]:
    """How often every row is drawn in each resample, block by block: `weight_BR`."""
    generator = np.random.default_rng([seed, num_rows])
    block = max(1, BLOCK_CELLS // max(1, num_rows))
    for first in range(0, resamples, block):
        size = min(block, resamples - first)
        drawn_BR = generator.integers(0, num_rows, (size, num_rows))
        flat = drawn_BR + np.arange(size)[:, None] * num_rows
        found = np.bincount(flat.ravel(), minlength=size * num_rows)
        yield found.reshape(size, num_rows).astype(np.float64)


def _resampled(measured: Measured, resamples: int, seed: int) -> Floats:
    blocks = counts(len(measured.rows), resamples=resamples, seed=seed)
    return np.concatenate([measured.at(weight_BR) for weight_BR in blocks])


def _percentiles(values_B: NDArray[Any]) -> tuple[float | None, float | None]:
    """The 2.5th and 97.5th; resamples in which the metric is not defined do not count."""
    finite = values_B[np.isfinite(values_B)]
    if not finite.size:
        return None, None
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def _bootstrap_p(found: float, difference_B: Floats, num_rows: int) -> float:
    if not difference_B.size or not math.isfinite(found):
        return 1.0
    # Sums of rounded numbers: a difference as far out as the one found must count as such.
    # Resampled differences spread too little by this factor (the variance's n instead of n - 1).
    limit = abs(found) * (1 - 1e-9) * math.sqrt(1 - 1 / max(num_rows, 1))
    num_as_far = int((np.abs(difference_B - difference_B.mean()) >= limit).sum())
    # So many rows cannot say more, even if all of them agree: the sign test's smallest p.
    return max((num_as_far + 1) / (len(difference_B) + 1), 2.0 ** (1 - num_rows))


def _check_paired(before: Measured, after: Measured) -> None:
    first = (before.name, before.signature, len(before.rows))
    second = (after.name, after.signature, len(after.rows))
    if first != second:
        raise EvaluationError(
            "evaluate.unpaired",
            before.name,
            found=f"{first} beside {second}",
            expected="the same metric, with one signature, of the same rows",
            try_="measure both files of predictions with the same options",
        )
