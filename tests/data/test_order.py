"""The order of samples and the split: pure, complete, pinned, stable."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.config.recipe import DataConfig
from tunesmith.data.order import order, split_samples
from tunesmith.data.plan import num_validation

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


@pytest.mark.parametrize(
    ("asked", "count", "expected"),
    [(0.1, 100, 10), (0.1, 3, 1), (0.9, 2, 1), (5, 100, 5), (0, 100, 0), (500, 100, 99)],
)
def test_number_held_out(asked: float, count: int, expected: int) -> None:
    data = DataConfig.model_validate({"train": "d", "validation": asked})
    assert num_validation(data, count) == expected


def test_files_of_their_own_hold_nothing_out() -> None:
    data = DataConfig.model_validate({"train": "d", "validation": "v.jsonl"})
    assert num_validation(data, 100) == 0
