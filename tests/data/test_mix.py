"""Several sources in one epoch: nothing lost or doubled, fair over epochs, pinned."""

import itertools
import typing
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.mix import Share, Strategy, mixed_order, replay_draws, share_of_rank
from tunesmith.data.order import order

STRATEGIES: list[Strategy] = list(typing.get_args(Strategy))
SEEDS = st.integers(0, 2**64 - 1)
EPOCHS = st.integers(0, 1000)


@st.composite
def shares_of_sources(draw: st.DrawFn) -> list[Share]:
    sizes = draw(st.lists(st.integers(0, 30), max_size=5))
    return [Share.by_count(size, draw(st.integers(0, 80))) for size in sizes]


def by_source(mixed: list[int], shares: list[Share]) -> list[list[int]]:
    """The draws of each source in the order they come, as numbers within the source."""
    ends = list(itertools.accumulate(share.size for share in shares))
    found: list[list[int]] = [[] for _ in shares]
    for sample in mixed:
        source = next(number for number, end in enumerate(ends) if sample < end)
        found[source].append(sample - (ends[source] - shares[source].size))
    return found


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SEEDS, EPOCHS, shares_of_sources(), st.sampled_from(STRATEGIES))
def test_each_source_gives_its_draws(
    seed: int, epoch: int, shares: list[Share], strategy: Strategy
) -> None:
    mixed = mixed_order(seed, epoch, shares, strategy)
    assert mixed.dtype == np.int64
    assert mixed.tolist() == mixed_order(seed, epoch, shares, strategy).tolist()
    draws = by_source(mixed.tolist(), shares)
    assert [len(samples) for samples in draws] == [share.draws for share in shares]
    for samples, share in zip(draws, shares, strict=True):
        counts = [Counter(samples)[sample] for sample in range(share.size)]
        # An epoch may touch one pass more at either end, so two samples may differ by two.
        assert max(counts, default=0) - min(counts, default=0) <= 2
        if share.draws and share.draws % share.size == 0:
            assert set(counts) == {share.draws // share.size}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SEEDS, shares_of_sources(), st.sampled_from(STRATEGIES), st.integers(1, 6))
def test_nothing_comes_again_before_all_came(
    seed: int, shares: list[Share], strategy: Strategy, num_epochs: int
) -> None:
    lines: list[list[int]] = [[] for _ in shares]
    for epoch in range(num_epochs):
        mixed = mixed_order(seed, epoch, shares, strategy).tolist()
        for line, samples in zip(lines, by_source(mixed, shares), strict=True):
            line += samples
    for line, share in zip(lines, shares, strict=True):
        for start in range(0, len(line), max(share.size, 1)):
            one_pass = line[start : start + share.size]
            assert len(set(one_pass)) == len(one_pass)
        counts = [Counter(line)[sample] for sample in range(share.size)]
        assert max(counts, default=0) - min(counts, default=0) <= 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SEEDS, EPOCHS, shares_of_sources())
def test_strategies_place_the_same_draws(seed: int, epoch: int, shares: list[Share]) -> None:
    lines = [
        by_source(mixed_order(seed, epoch, shares, strategy).tolist(), shares)
        for strategy in STRATEGIES
    ]
    assert all(line == lines[0] for line in lines)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(SEEDS, EPOCHS, st.integers(0, 200), st.sampled_from(STRATEGIES))
def test_one_source_keeps_the_order_of_before(
    seed: int, epoch: int, size: int, strategy: Strategy
) -> None:
    mixed = mixed_order(seed, epoch, [Share.by_weight(size, 1.0)], strategy)
    assert mixed.tolist() == order(seed, epoch, size).tolist()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(EPOCHS, shares_of_sources())
def test_concat_keeps_sources_apart(epoch: int, shares: list[Share]) -> None:
    mixed = mixed_order(0, epoch, shares, "concat").tolist()
    draws = by_source(mixed, shares)
    starts = itertools.accumulate((share.size for share in shares), initial=0)
    joined = [start + n for start, samples in zip(starts, draws, strict=False) for n in samples]
    assert mixed == joined


@settings(max_examples=100, deadline=None, derandomize=True)
@given(EPOCHS, shares_of_sources())
def test_interleave_spreads_evenly(epoch: int, shares: list[Share]) -> None:
    mixed = mixed_order(0, epoch, shares, "interleave").tolist()
    for number, share in enumerate(shares):
        start = sum(other.size for other in shares[:number])
        is_ours = [start <= sample < start + share.size for sample in mixed]
        for length, seen in enumerate(itertools.accumulate(is_ours), start=1):
            # Each of the sources is at most half a draw off its share of any beginning.
            expected = length * share.draws / len(mixed)
            assert abs(seen - expected) <= 0.5 + len(shares) * 0.5


def test_interleave_by_example() -> None:
    shares = [Share(4, 4), Share(2, 2), Share(1, 1)]
    sources = np.array([0, 0, 0, 0, 1, 1, 2])
    # 1/8 3/8 5/8 7/8 · 1/4 3/4 · 1/2
    assert sources[mixed_order(0, 0, shares, "interleave")].tolist() == [0, 1, 0, 2, 0, 1, 0]
    # Ties: 1/4 3/4 of both, and the earlier source comes first.
    shares = [Share(2, 2), Share(2, 2)]
    assert (mixed_order(0, 0, shares, "interleave") // 2).tolist() == [0, 1, 0, 1]


def test_shuffle_gives_every_place_to_every_sample() -> None:
    shares = [Share(4, 4), Share(2, 2)]
    epochs = np.stack([mixed_order(0, epoch, shares, "shuffle") for epoch in range(3000)])
    counts = np.stack([np.bincount(epochs[:, place], minlength=6) for place in range(6)])
    assert counts.min() > 500 - 105  # five standard deviations around 3000 / 6
    assert counts.max() < 500 + 105


def test_sources_of_one_size_are_shuffled_apart() -> None:
    mixed = mixed_order(0, 0, [Share(50, 50), Share(50, 50)], "concat")
    assert mixed[:50].tolist() != (mixed[50:] - 50).tolist()


GOLDEN: list[tuple[int, int, Strategy, list[int]]] = [
    (0, 0, "shuffle", [0, 11, 2, 7, 5, 1, 4, 6, 7, 13, 3]),
    (0, 1, "shuffle", [3, 5, 2, 4, 14, 1, 6, 8, 0, 6, 5]),
    (1, 0, "shuffle", [3, 10, 2, 6, 5, 7, 0, 6, 1, 4, 8]),
    (2**63, 7, "shuffle", [11, 0, 5, 4, 2, 15, 6, 3, 6, 7, 1]),
    (0, 0, "concat", [0, 2, 1, 4, 3, 7, 5, 6, 7, 11, 13]),
    (0, 1, "concat", [3, 2, 4, 1, 0, 5, 6, 6, 5, 14, 8]),
    (1, 0, "concat", [3, 2, 0, 1, 4, 6, 5, 7, 6, 10, 8]),
    (2**63, 7, "concat", [0, 4, 2, 3, 1, 5, 6, 6, 7, 11, 15]),
    (0, 0, "interleave", [0, 7, 11, 2, 5, 1, 6, 4, 13, 7, 3]),
    (0, 1, "interleave", [3, 5, 14, 2, 6, 4, 6, 1, 8, 5, 0]),
    (1, 0, "interleave", [3, 6, 10, 2, 5, 0, 7, 1, 8, 6, 4]),
    (2**63, 7, "interleave", [0, 5, 11, 4, 6, 2, 6, 3, 15, 7, 1]),
]


@pytest.mark.parametrize(("seed", "epoch", "strategy", "expected"), GOLDEN)
def test_golden_values(seed: int, epoch: int, strategy: Strategy, expected: list[int]) -> None:
    # Pinned: another order would make every resumed run go on with other data.
    shares = [Share.by_weight(5, 1.0), Share.by_count(3, 4), Share.by_weight(8, 0.25)]
    assert mixed_order(seed, epoch, shares, strategy).tolist() == expected


@pytest.mark.parametrize(
    ("share", "draws"),
    [
        (Share.by_weight(10, 1.0), 10),
        (Share.by_weight(10, 2.5), 25),
        (Share.by_weight(10, 0.31), 3),
        (Share.by_weight(10, 0.01), 1),
        (Share.by_weight(0, 3.0), 0),
        (Share.by_count(10, 4), 4),
        (Share.by_count(10, 40), 40),
        (Share.by_count(0, 40), 0),
    ],
)
def test_draws(share: Share, draws: int) -> None:
    assert share.draws == draws


@pytest.mark.parametrize(
    ("num_draws", "share", "expected"),
    [(90, 0.1, 10), (100, 0.5, 100), (100, 0.0, 0), (0, 0.5, 0), (3, 0.01, 1), (95, 0.05, 5)],
)
def test_replay_draws(num_draws: int, share: float, expected: int) -> None:
    assert replay_draws(num_draws, share) == expected


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 10**6), st.floats(0.001, 0.9))
def test_replay_makes_up_its_share(num_draws: int, share: float) -> None:
    draws = replay_draws(num_draws, share)
    assert abs(draws - share * (num_draws + draws)) <= 1


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 100), st.integers(1, 40), SEEDS)
def test_ranks_share_a_global_batch(size: int, world_size: int, seed: int) -> None:
    batch = order(seed, 0, size)
    parts = [share_of_rank(batch, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(size))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
