"""Intervals cover what they should, and tests say what tables and scipy say."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from tunesmith.errors import EvaluationError
from tunesmith.evaluate.intervals import (
    Measured,
    compare,
    counts,
    from_sums,
    interval,
    mcnemar,
    mean_of,
    ratio,
    share_of,
    sign_test,
    verdict,
    wilson,
)


def test_a_mean_and_its_interval_are_those_of_its_rows() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, 400).tolist()
    score = mean_of("m", [*values, None], signature="s").score()
    assert score.value == pytest.approx(float(np.mean(values)), abs=1e-12)
    assert score.num_rows == 400 and score.signature == "m|s" and score.rows[-1] is None
    assert score.low is not None and score.high is not None
    # The normal interval is 2 * 1.96 / sqrt(400) wide.
    assert score.high - score.low == pytest.approx(0.196 * float(np.std(values)), rel=0.1)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator, covered, trials = np.random.default_rng(1), 0, 300
    for _ in range(trials):
        values = generator.exponential(1.0, 80).tolist()
        low, high = interval(mean_of("m", values, signature=""), resamples=500)
        assert low is not None and high is not None
        covered += low <= 1.0 <= high
    # 95 % less what percentiles lose on skewed data of 80 rows; 3 sigma of 300 trials are 4 %.
    assert 0.88 <= covered / trials <= 0.985


def test_a_ratio_of_sums_is_resampled_as_such() -> None:
    stats = np.random.default_rng(2).integers(1, 9, (200, 2)).astype(float)
    stats[:, 1] += stats[:, 0]
    measured = from_sums(
        "r", stats, lambda sums: ratio(sums[:, 0], sums[:, 1]), rows=(None,) * 200, signature=""
    )
    low, high = interval(measured)
    assert measured.value == stats[:, 0].sum() / stats[:, 1].sum()
    assert low is not None and high is not None and low < measured.value < high
    drawn = np.random.default_rng([0, 200]).integers(0, 200, (2000, 200))
    sums = stats[drawn].sum(axis=1)
    expected = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    assert (low, high) == pytest.approx(tuple(expected), abs=1e-12)


def test_counts_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(counts(10, resamples=20, seed=3)))
    monkeypatch.setattr("tunesmith.evaluate.intervals.BLOCK_CELLS", 30)
    parts = list(counts(10, resamples=20, seed=3))
    assert len(parts) == 7 and np.array_equal(np.concatenate(parts), whole)
    assert (whole.sum(axis=1) == 10).all()


def test_shares_have_wilsons_interval() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    score = share_of("x", [False] * 20, signature="").score()
    assert (score.low, score.high) == wilson(0, 20)
    assert mean_of("x", [0.0] * 20, signature="").score().high == 0.0


def test_one_row_has_no_interval() -> None:
    assert interval(mean_of("m", [1.0, None], signature="")) == (None, None)


def test_mcnemar_by_hand() -> None:
    before = [1.0] * 2 + [0.0] * 10 + [1.0] * 88
    after = [0.0] * 2 + [1.0] * 10 + [1.0] * 88
    # 12 rows differ, 2 one way: 2 * (1 + 12 + 66) / 4096.
    assert mcnemar(before, after) == 2 * 79 / 4096
    assert sign_test(5, 5) == 1.0 and sign_test(0, 0) == 1.0
    assert sign_test(6, 0) == 2 / 64
    assert sign_test(3000, 2500) == sign_test(2500, 3000) < 1e-10


@pytest.mark.slow
def test_the_sign_test_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for wins, losses in ((3, 9), (40, 60), (1, 0), (700, 640)):
        expected = stats.binomtest(wins, wins + losses).pvalue
        assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)
    low, high = stats.binomtest(17, 50).proportion_ci(method="wilson")
    assert wilson(17, 50) == pytest.approx((low, high), rel=1e-9)


def test_rows_that_are_right_or_wrong_are_compared_by_mcnemar() -> None:
    before, after = [False] * 30 + [True] * 30, [False] * 15 + [True] * 45
    found = compare(share_of("a", before, signature=""), share_of("a", after, signature=""))
    assert found.test == "mcnemar-exact" and found.p_value == 2 / 2**15
    assert found.verdict == "better" and found.low < 0.25 < found.high


def test_differences_smaller_than_the_noise_are_found_in_pairs() -> None:
    generator = np.random.default_rng(4)
    hard = generator.normal(0, 10, 300)
    before = mean_of("m", hard.tolist(), signature="", better="lower")
    after = mean_of(
        "m", (hard + generator.normal(-0.2, 0.5, 300)).tolist(), signature="", better="lower"
    )
    found = compare(before, after)
    assert found.verdict == "better" and found.high < 0 and found.p_value < 0.01
    assert compare(after, before).verdict == "worse"
    same = compare(before, before)
    assert (same.p_value, same.low, same.high) == (1.0, 0.0, 0.0)
    assert same.verdict == "no clear difference"


def test_p_values_of_equal_models_are_even() -> None:
    generator, values = np.random.default_rng(5), []
    for _ in range(200):
        first, second = generator.normal(0, 1, (2, 60)).tolist()
        pair = mean_of("m", first, signature=""), mean_of("m", second, signature="")
        values.append(compare(*pair, resamples=200).p_value)
    assert sum(value < 0.05 for value in values) <= 22
    assert 0.4 < float(np.mean(values)) < 0.6


def test_only_the_same_metric_of_the_same_rows_is_compared() -> None:
    two = mean_of("m", [1.0, 2.0], signature="s")
    for other in (
        mean_of("m", [1.0], signature="s"),
        mean_of("n", [1.0, 2.0], signature="s"),
        mean_of("m", [1.0, 2.0], signature="t"),
    ):
        with pytest.raises(EvaluationError, match=r"evaluate\.unpaired"):
            compare(two, other)


def test_verdicts_need_a_direction_and_a_difference() -> None:
    assert verdict(0.1, 0.01, "neither") == "no clear difference"
    assert verdict(0.0, 0.0, "higher") == "no clear difference"
    assert verdict(-0.1, 0.01, "higher") == "worse"


def test_resamples_without_a_value_do_not_count() -> None:
    def at(weight: np.ndarray) -> np.ndarray:
        return ratio(weight[:, 0], weight[:, 0])

    low, high = interval(Measured("m", "", "higher", at, (1.0, 1.0), 2))
    assert (low, high) == (1.0, 1.0)

    def nowhere(weight: np.ndarray) -> np.ndarray:
        return np.full(len(weight), np.nan)

    nothing = Measured("m", "", "higher", nowhere, (1.0, 1.0), 2)
    assert interval(nothing) == (None, None)
    assert compare(nothing, nothing).p_value == 1.0


def test_scores_can_be_sent_between_processes() -> None:
    score = mean_of("m", [1.0, 2.0], signature="").score()
    assert pickle.loads(pickle.dumps(score)) == score
