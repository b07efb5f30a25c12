"""Shared prefixes: every sequence can be read back, the budget holds, and what is shared saves."""

from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data import prefixes
from tunesmith.data.loader import Loader
from tunesmith.data.pack import LEAST_SAVED, build_batch, pack, pack_sequences
from tunesmith.data.prefixes import shared_prefixes
from tunesmith.data.store import TokenStore
from tunesmith.data.tokenize import TokenSequence
from tunesmith.types import PackedBatch

Ids = npt.NDArray[np.int32]
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def _short_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes of three tokens count, so that small sequences share."""
    monkeypatch.setattr(prefixes, "SHORTEST_PREFIX", 3)


@st.composite
def families(draw: st.DrawFn) -> list[Ids]:
    """Sequences that go on from a few beginnings, which go on from each other."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    beginnings: list[list[int]] = [[]]
    sequences: list[Ids] = []
    for _ in range(draw(st.integers(1, 20))):
        start = draw(st.sampled_from(beginnings))
        tokens = [*start, *rng.integers(0, draw(st.sampled_from([2, 50])), draw(st.integers(1, 9)))]
        if draw(st.booleans()):
            beginnings.append(tokens)
        sequences.append(np.array(tokens, dtype=np.int32))
    return sequences


def paths(batch: PackedBatch) -> list[tuple[list[int], list[int]]]:
    """(token ids, stream rows) of every sequence: of each segment without children its path."""
    segments = batch.segments
    parents = set(segments.parents)
    found: list[tuple[list[int], list[int]]] = []
    for segment in range(len(segments.lengths)):
        if segment not in parents:
            rows = [
                row
                for one in (*segments.ancestors(segment), segment)
                for row in range(segments.starts[one], segments.starts[one + 1])
            ]
            assert batch.position_T[rows].tolist() == list(range(len(rows)))
            found.append((batch.ids_T[rows].tolist(), rows))
    return found


@EXAMPLES
@given(families(), st.integers(5, 80))
def test_every_sequence_can_be_read_back(sequences: list[Ids], budget: int) -> None:
    whole = [TokenSequence(ids, ((0, len(ids), 1.0),)) for ids in sequences]
    bins = pack_sequences(sequences, budget, share_prefixes=True)
    read: list[list[int]] = []
    supervised: dict[int, list[int]] = {number: [] for number in range(len(sequences))}
    for forest in bins:
        batch = build_batch(list(enumerate(whole)), forest)
        members = paths(batch)
        read += [ids for ids, _ in members]
        assert batch.num_stored_tokens <= budget or len(members) == 1
        assert batch.num_tokens == sum(len(ids) for ids, _ in members)
        next_of = {(r, i) for ids, rows in members for r, i in zip(rows, ids[1:], strict=False)}
        for row, target, sample in zip(
            batch.row_N.tolist(), batch.target_N.tolist(), batch.sample_N.tolist(), strict=True
        ):
            assert (row, target) in next_of
            supervised[sample].append(target)
    assert sorted(read) == sorted(ids.tolist() for ids in sequences)
    assert all(supervised[n] == ids[1:].tolist() for n, ids in enumerate(sequences))
    assert bins == pack_sequences([ids.copy() for ids in sequences], budget, share_prefixes=True)


@EXAMPLES
@given(families())
def test_a_forest_stores_each_common_prefix_once(sequences: list[Ids]) -> None:
    forest = shared_prefixes(sequences)
    leaves = [leaf for branch in forest for leaf in branch.leaves()]
    assert sorted(leaf.sequence for leaf in leaves) == list(range(len(sequences)))
    assert all(leaf.stop == len(sequences[leaf.sequence]) > leaf.first for leaf in leaves)
    # Trees of a forest, and branches of a prefix, have fewer than three more tokens in common.
    tops = [sequences[branch.sequence] for branch in forest]
    for number, one in enumerate(tops):
        for other in tops[:number]:
            assert prefixes._num_common(one, other) < 3  # pyright: ignore[reportPrivateUsage]


@EXAMPLES
@given(families(), st.integers(5, 80))
def test_without_sharing_it_is_pack(sequences: list[Ids], budget: int) -> None:
    bins = pack_sequences(sequences, budget, share_prefixes=False)
    expected = pack([len(ids) for ids in sequences], budget)
    assert [[branch.sequence for branch in forest] for forest in bins] == expected
    assert not any(branch.children or branch.first for forest in bins for branch in forest)


def ids(*tokens: int) -> Ids:
    return np.array(tokens, dtype=np.int32)


def test_a_tree_of_two_levels() -> None:
    system, question = [1, 2, 3, 4], [5, 6, 7]
    sequences = [
        ids(*system, *question, 8),
        ids(*system, 9, 9),
        ids(*system, *question, 10, 11),
        ids(9, 9, 9),
    ]
    (forest,) = pack_sequences(sequences, 100, share_prefixes=True)
    whole = [TokenSequence(one, ((len(one) - 1, 1, 0.5),)) for one in sequences]
    batch = build_batch([(10 + n, one) for n, one in enumerate(whole)], forest)
    assert batch.segments.lengths == (4, 3, 1, 2, 2, 3)
    assert batch.segments.parents == (-1, 0, 1, 1, 0, -1)
    assert batch.segments.offsets == (0, 4, 7, 7, 4, 0)
    assert batch.segments.reach == 9
    assert batch.segments.ancestors(3) == (0, 1)
    assert batch.ids_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 9, 9, 9, 9, 9]
    assert batch.sample_N.tolist() == [10, 12, 11, 13]
    assert batch.row_N.tolist() == [6, 8, 10, 13]
    assert (batch.num_tokens, batch.num_stored_tokens) == (8 + 6 + 9 + 3, 15)


def test_equal_sequences_keep_a_token_each() -> None:
    forest = shared_prefixes([ids(1, 2, 3, 4, 5)] * 3)
    batch = build_batch([(n, TokenSequence(ids(1, 2, 3, 4, 5), ())) for n in range(3)], forest)
    assert batch.segments.lengths == (4, 1, 1, 1)
    assert batch.segments.parents == (-1, 0, 0, 0)


def test_a_prefix_larger_than_a_batch_is_there_again_in_each() -> None:
    common = list(range(10))
    sequences = [ids(*common, 100 + n, 200 + n) for n in range(5)]
    bins = pack_sequences(sequences, 14, share_prefixes=True)
    assert [sum(branch.num_stored for branch in forest) for forest in bins] == [14, 14, 12]
    assert pack_sequences(sequences, 8, share_prefixes=True) == [
        [prefixes.Branch(n, 0, 12)] for n in range(5)
    ]


def test_little_is_not_shared() -> None:
    sequences = [ids(1, 2, 3, 4), ids(1, 2, 3, 5), ids(*range(10, 210))]
    assert 3 / sum(map(len, sequences)) < LEAST_SAVED
    (forest,) = pack_sequences(sequences, 1000, share_prefixes=True)
    assert not any(branch.children for branch in forest)
    # The whole saves enough here, but not in the batch of the long one.
    more = [ids(*range(10)), ids(*range(9), 99), ids(*range(500, 560)), ids(*range(3), 7, 7)]
    by_bin = pack_sequences(more, 66, share_prefixes=True)
    assert [any(branch.children for branch in forest) for forest in by_bin] == [False, True]


def test_deep_chains_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "MOST_LEVELS", 4)
    forest = shared_prefixes([np.arange(n, dtype=np.int32) for n in range(5, 200, 5)])
    batch = build_batch(
        [(0, TokenSequence(np.arange(n, dtype=np.int32), ())) for n in range(5, 200, 5)], forest
    )
    depths = {len(batch.segments.ancestors(n)) for n in range(len(batch.segments.lengths))}
    assert depths == {0, 1, 2, 3, 4} and len(paths(batch)) == 39


def test_the_tail_fills_up_the_stream() -> None:
    one = TokenSequence(np.arange(5, dtype=np.int32), ((1, 4, 1.0),))
    batch = build_batch([(0, one)], multiple_of=8)
    assert batch.ids_T.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert batch.position_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.segments.lengths == (5, 3) and batch.segments.parents == ()
    assert (batch.num_tokens, batch.num_stored_tokens) == (5, 8)
    assert batch.row_N.tolist() == [0, 1, 2, 3]
    assert build_batch([(0, one)], multiple_of=5).segments.lengths == (5,)


# Through the loader


class FakeStore:
    """A store of questions about three texts; every answer is supervised."""

    is_text = np.zeros(40, dtype=np.bool_)

    def sequences_of(self, sample: int) -> range:
        return range(sample, sample + 1)

    def length(self, index: int) -> int:
        return 20 * (index % 3 + 1) + index

    def sequence(self, index: int, window: tuple[int, int]) -> TokenSequence:
        shared = 20 * (index % 3 + 1)
        tokens = [*range(1000 * (index % 3), 1000 * (index % 3) + shared), *[9000 + index] * index]
        start, stop = window
        run = (shared - start, stop - shared, 1.0)
        return TokenSequence(np.array(tokens[start:stop], dtype=np.int32), (run,) if index else ())


@pytest.fixture
def loader() -> Loader:
    return Loader(
        cast("TokenStore", FakeStore()),
        np.arange(40),
        global_batch=16,
        micro_batch_tokens=300,
        max_length=200,
        seed=0,
    )


@pytest.mark.parametrize("pad_to", [1, 64])
def test_global_batches_ask_for_the_same_work(loader: Loader, pad_to: int) -> None:
    plain = replace(loader, share_prefixes=False)
    for step in range(5):
        one, other = replace(loader, pad_to=pad_to).batch(step), plain.batch(step)
        assert (one.sample_ids, one.num_tokens) == (other.sample_ids, other.num_tokens)
        assert one.num_supervised == other.num_supervised
        assert one.supervised_weight == other.supervised_weight
        assert one.num_stored_tokens == sum(len(m.ids_T) for m in one.micro_batches)
        assert one.num_stored_tokens < other.num_stored_tokens == other.num_tokens
        assert all(m.num_stored_tokens % pad_to == 0 for m in one.micro_batches)
        assert len(one.micro_batches) < len(other.micro_batches)
        targets = [
            sorted(t for m in batch.micro_batches for t in m.target_N.tolist())
            for batch in (one, other)
        ]
        assert targets[0] == targets[1]


def test_evaluation_shares_too(loader: Loader) -> None:
    batches, plain = (
        list(each.all_batches()) for each in (loader, replace(loader, share_prefixes=False))
    )
    assert sum(b.num_tokens for b in batches) == sum(b.num_tokens for b in plain)
    assert sum(b.num_stored_tokens for b in batches) < sum(b.num_stored_tokens for b in plain)
    samples = [sorted(s for b in each for s in b.sample_N.tolist()) for each in (batches, plain)]
    assert samples[0] == samples[1]
