"""The order of samples and the split: pure, complete, pinned, stable."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.config.recipe import DataConfig
from tunesmith.data.order import (
    drop_leaked,
    order,
    split_by_source,
    split_samples,
    stream_seed,
)
from tunesmith.data.plan import num_validation
from tunesmith.errors import DataError

GOLDEN_SEEDS = [7, 7191089600892374487, 11777423816826542271]
HASHES = np.random.Generator(np.random.PCG64(0)).integers(0, 2**64, 2000, dtype=np.uint64)


def test_golden_values() -> None:
    # Pinned: another order would make every resumed run go on with other data.
    assert order(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert order(0, 1, 10).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert order(1, 0, 10).tolist() == [3, 5, 2, 9, 7, 0, 8, 6, 1, 4]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 2**63), st.integers(0, 1000), st.integers(0, 200))
def test_a_pure_permutation(seed: int, epoch: int, count: int) -> None:
    first = order(seed, epoch, count)
    assert sorted(first.tolist()) == list(range(count))
    assert first.tolist() == order(seed, epoch, count).tolist()


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(order(seed, epoch, 50).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_every_place_is_equally_likely() -> None:
    places = np.stack([order(0, epoch, 8) for epoch in range(2000)])
    counts = np.stack([np.bincount(places[:, column], minlength=8) for column in range(8)])
    assert counts.min() > 250 - 75  # five standard deviations around 2000 / 8
    assert counts.max() < 250 + 75


def test_streams_have_seeds_of_their_own() -> None:
    # Pinned like the order itself.
    assert [stream_seed(7, number) for number in (0, 1, -1)] == GOLDEN_SEEDS
    seeds = [stream_seed(seed, number) for seed in range(50) for number in range(-1, 50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert stream_seed(2**64 - 1, 0) == 2**64 - 1
    order(stream_seed(2**64 - 1, 3), 0, 5)


# The split


@pytest.mark.parametrize("count", [1, 7, 200, 1999])
def test_split_has_the_count_asked_for(count: int) -> None:
    train, held_out = split_samples(HASHES, count, seed=0)
    assert len(held_out) == count
    assert sorted([*train, *held_out]) == list(range(2000))
    assert (np.diff(train) > 0).all()
    assert (np.diff(held_out) > 0).all()


@pytest.mark.parametrize("count", [0, -1])
def test_nothing_held_out(count: int) -> None:
    train, held_out = split_samples(HASHES, count, seed=0)
    assert train.tolist() == list(range(2000))
    assert held_out.tolist() == []


def test_duplicates_are_on_one_side() -> None:
    hashes = np.repeat(HASHES[:100], 5)
    np.random.default_rng(0).shuffle(hashes)
    for count in range(1, 400, 13):
        train, held_out = split_samples(hashes, count, seed=0)
        assert set(hashes[train]).isdisjoint(hashes[held_out])
        assert count <= len(held_out) < count + 5


def test_something_is_left_to_train_on() -> None:
    for count in (1, 3, 10):
        train, held_out = split_samples(np.repeat(HASHES[:1], 3), count, seed=0)
        assert train.tolist() == [0, 1, 2]
        assert held_out.tolist() == []


def test_seeds_split_differently() -> None:
    splits = {tuple(split_samples(HASHES, 20, seed=seed)[1].tolist()) for seed in range(10)}
    assert len(splits) == 10


def test_split_depends_on_the_content_alone() -> None:
    # The same samples in another order of rows: the same ones are held out.
    shuffled = np.random.default_rng(0).permutation(2000)
    _, held_out = split_samples(HASHES, 200, seed=3)
    _, after = split_samples(HASHES[shuffled], 200, seed=3)
    assert set(HASHES[held_out]) == set(HASHES[shuffled][after])


def test_split_is_stable_when_rows_are_added() -> None:
    _, before = split_samples(HASHES[:1000], 100, seed=0)
    _, after = split_samples(HASHES[:1100], 110, seed=0)
    kept = set(before.tolist()) & set(after.tolist())
    assert len(kept) >= 85  # a fresh random split would keep about ten
    # With the same number held out, no sample moves from training to validation.
    _, same = split_samples(HASHES[:1100], 100, seed=0)
    assert set(same[same < 1000].tolist()) <= set(before.tolist())


def test_sequential_hashes_are_mixed() -> None:
    _, held_out = split_samples(np.arange(1000, dtype=np.uint64), 100, seed=0)
    assert 300 < held_out.mean() < 700


# The split by source


def rows_of(sources: npt.NDArray[np.int64], count: int) -> list[int]:
    return np.bincount(sources, minlength=count).tolist()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 40), max_size=120),
    st.integers(-1, 130),
    st.integers(0, 2**64 - 2),
    st.integers(0, 3),
)
def test_one_source_is_split_samples(values: list[int], count: int, seed: int, source: int) -> None:
    hashes = np.array(values, dtype=np.uint64)
    sources = np.full(len(hashes), source)
    plain = split_samples(hashes, count, seed)
    by_source = split_by_source(hashes, sources, count, seed)
    assert [side.tolist() for side in by_source] == [side.tolist() for side in plain]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 4)), max_size=120),
    st.integers(0, 130),
    st.integers(0, 100),
)
def test_no_row_is_lost_and_no_sample_is_on_both_sides(
    rows: list[tuple[int, int]], count: int, seed: int
) -> None:
    hashes = np.array([value for value, _ in rows], dtype=np.uint64)
    sources = np.array([source for _, source in rows], dtype=np.int64)
    train, held_out = split_by_source(hashes, sources, count, seed)
    assert sorted([*train, *held_out]) == list(range(len(rows)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(held_out) > 0).all()
    assert not drop_leaked(hashes[train], hashes[held_out]).any()
    assert len(train) > 0 or not rows


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ([1000, 500, 500], 100, [50, 25, 25]),
        ([1000, 500, 400], 100, [53, 26, 21]),  # 52.6, 26.3, 21.05
        ([700, 700, 600], 2, [1, 1, 0]),  # too few for one each
        ([1900, 90, 10], 10, [8, 1, 1]),  # 9.5, 0.45, 0.05, and one for each small source
        ([1900, 90, 10], 20, [18, 1, 1]),  # 19, 0.9, 0.1: ten rows are enough for one
        ([1900, 91, 9], 20, [19, 1, 0]),  # nine are not
        ([2000], 100, [100]),
        ([0, 1500, 0, 500], 100, [0, 75, 0, 25]),
    ],
)
def test_each_source_gives_its_share(sizes: list[int], count: int, expected: list[int]) -> None:
    sources = np.repeat(np.arange(len(sizes)), sizes)
    _, held_out = split_by_source(HASHES[: len(sources)], sources, count, seed=0)
    assert rows_of(sources[held_out], len(sizes)) == expected


def test_copies_in_another_source_follow() -> None:
    # The second source is a part of the first, the third repeats one sample of it 500 times.
    hashes = np.concatenate([HASHES[:1000], HASHES[:50], np.repeat(HASHES[0], 500)])
    sources = np.repeat([0, 1, 2], [1000, 50, 500])
    for seed in range(20):
        train, held_out = split_by_source(hashes, sources, 100, seed)
        assert set(hashes[train]).isdisjoint(hashes[held_out])
        counts = rows_of(sources[held_out], 3)
        assert counts[1] >= 1
        assert sum(counts) < 200 or counts[2] == 500


def test_a_shared_sample_counts_for_the_smallest_source() -> None:
    # The second source is a part of the first and would get none by chance alone.
    hashes = np.concatenate([HASHES[:1900], HASHES[:20]])
    sources = np.repeat([0, 1], [1900, 20])
    for seed in range(20):
        _, held_out = split_by_source(hashes, sources, 10, seed)
        assert rows_of(sources[held_out], 2)[1] >= 1


def test_split_by_source_is_stable_when_rows_are_added() -> None:
    sources = np.arange(1100) % 3
    _, before = split_by_source(HASHES[:1000], sources[:1000], 100, seed=0)
    _, after = split_by_source(HASHES[:1100], sources, 110, seed=0)
    assert len(set(before.tolist()) & set(after.tolist())) >= 85
    shuffled = np.random.default_rng(0).permutation(1000)
    _, moved = split_by_source(HASHES[:1000][shuffled], sources[:1000][shuffled], 100, seed=0)
    assert set(shuffled[moved].tolist()) == set(before.tolist())


def test_a_source_is_not_held_out_whole() -> None:
    sources = np.repeat([0, 1], [10, 1])
    _, held_out = split_by_source(HASHES[:11], sources, 9, seed=0)
    assert rows_of(sources[held_out], 2) == [8, 0]


def test_drop_leaked() -> None:
    train, validation = HASHES[[1, 2, 1, 3]], HASHES[[3, 1]]
    assert drop_leaked(train, validation).tolist() == [True, False, True, True]
    assert drop_leaked(train, validation[:0]).tolist() == [False] * 4
    assert drop_leaked(train[:0], validation).tolist() == []


@pytest.mark.parametrize(
    ("asked", "count", "expected"),
    [(0.1, 100, 10), (0.1, 3, 1), (0.9, 2, 1), (5, 100, 5), (0, 100, 0), (99, 100, 99)],
)
def test_number_held_out(asked: float, count: int, expected: int) -> None:
    data = DataConfig.model_validate({"train": "d", "validation": asked})
    assert num_validation(data, count) == expected


def test_all_rows_cannot_be_held_out() -> None:
    data = DataConfig.model_validate({"train": "d", "validation": 100})
    with pytest.raises(DataError, match="100 rows to hold out of 100"):
        num_validation(data, 100)


def test_files_of_their_own_hold_nothing_out() -> None:
    data = DataConfig.model_validate({"train": "d", "validation": "v.jsonl"})
    assert num_validation(data, 100) == 0
