"""Packing: every sequence once, no bin over budget; batches against a naive loop."""

import json
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.pack import build_batch, pack, pack_groups
from tunesmith.data.prefixes import Branch, shared_prefixes
from tunesmith.data.tokenize import Run, TokenSequence
from tunesmith.types import PackedBatch

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
LENGTHS = st.lists(st.integers(1, 60), max_size=60)
BUDGETS = st.integers(1, 100)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(LENGTHS, BUDGETS)
def test_each_index_once_within_the_budget(lengths: list[int], budget: int) -> None:
    bins = pack(lengths, budget)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    for members in bins:
        sizes = [lengths[index] for index in members]
        assert sum(sizes) <= budget or len(members) == 1
        assert sizes == sorted(sizes, reverse=True)
    assert bins == pack(list(lengths), budget)


def slow_pack(lengths: list[int], budget: int) -> list[list[int]]:
    """Best fit, longest first, in the words of the textbook."""
    bins: list[list[int]] = []
    rooms: list[int] = []
    sizes = [max(length, 1) for length in lengths]
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        length = sizes[index]
        fitting = [number for number, room in enumerate(rooms) if room >= length]
        if fitting:
            best = min(fitting, key=lambda number: rooms[number])
            bins[best].append(index)
            rooms[best] -= length
        else:
            bins.append([index])
            rooms.append(max(budget - length, 0))
    return bins


# Few distinct lengths fill runs of equal bins; many break them up.
FEW_LENGTHS = st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 21, 40]), max_size=300)
MANY_LENGTHS = st.lists(st.integers(0, 120), max_size=300)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(FEW_LENGTHS | MANY_LENGTHS, BUDGETS)
def test_is_the_slow_reference(lengths: list[int], budget: int) -> None:
    assert pack(lengths, budget) == slow_pack(lengths, budget)


def lognormal(count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    # Uniform numbers and the normal's inverse by Box and Muller: the same in every numpy.
    uniform = np.random.Philox(seed).random_raw(2 * count) / 2.0**64
    normal = np.sqrt(-2 * np.log1p(-uniform[:count])) * np.cos(2 * np.pi * uniform[count:])
    return np.clip(np.rint(500 * np.exp(normal)), 10, 8192).astype(np.int64)


def waste(bins: list[list[int]], lengths: npt.NDArray[np.int64], budget: int) -> float:
    """Share of the budget left empty, over the bins that hold no overlong sequence."""
    totals = [int(lengths[members].sum()) for members in bins]
    fitting = [total for total in totals if total <= budget]
    return 1 - sum(fitting) / (len(fitting) * budget)


@pytest.mark.parametrize("budget", [8192, 2048])
def test_chat_lengths(budget: int) -> None:
    lengths = lognormal(3000)
    bins = pack(lengths.tolist(), budget)
    assert bins == slow_pack(lengths.tolist(), budget)
    assert waste(bins, lengths, budget) < 0.01


def test_real_lengths() -> None:
    if not SHARED.is_dir():
        pytest.skip("the shared folder of real data is not beside this checkout")
    rows = [
        row
        for name in ("alpaca_en_demo", "alpaca_zh_demo", "identity")
        for row in json.loads((SHARED / "llamafactory-demo" / f"{name}.json").read_text("utf-8"))
    ]
    # Two characters a token is near enough for the shape of the distribution.
    lengths = np.array([sum(len(str(text)) for text in row.values()) // 2 for row in rows])
    for budget in (2048, 8192):
        assert waste(pack(lengths.tolist(), budget), lengths, budget) < 0.01


def test_a_hundred_thousand_lengths_are_fast() -> None:
    # A million take under a second on a laptop core; the bound leaves room for a busy machine and
    # still fails for anything that searches bin by bin.
    lengths = lognormal(100_000).tolist()
    start = time.perf_counter()
    bins = pack(lengths, 2048)
    assert time.perf_counter() - start < 2
    assert sum(map(len, bins)) == len(lengths)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(LENGTHS.filter(bool), st.integers(60, 200))
def test_no_two_bins_could_be_one(lengths: list[int], budget: int) -> None:
    totals = sorted(sum(lengths[i] for i in members) for members in pack(lengths, budget))
    # Best fit opens a bin only where nothing has room, so at most one is half empty.
    assert all(total * 2 > budget for total in totals[1:])


@pytest.mark.parametrize(
    ("lengths", "budget", "bins"),
    [
        ([], 8, []),
        ([3], 8, [[0]]),
        ([5, 3, 5, 3], 8, [[0, 1], [2, 3]]),
        ([9, 8, 1, 20], 8, [[3], [0], [1], [2]]),
        ([4, 6, 2, 4], 8, [[1, 2], [0, 3]]),
        ([1, 1, 1], 2, [[0, 1], [2]]),
    ],
)
def test_bins(lengths: list[int], budget: int, bins: list[list[int]]) -> None:
    assert pack(lengths, budget) == bins


# Batches


def sequence(length: int, *runs: Run, start: int = 0) -> TokenSequence:
    return TokenSequence(np.arange(start, start + length, dtype=np.int32), runs)


def naive(sequences: list[tuple[int, TokenSequence]]) -> list[tuple[int, int, float, int]]:
    """(row, target, weight, sample) of every supervised token, found token by token."""
    found: list[tuple[int, int, float, int]] = []
    start = 0
    for sample, item in sequences:
        for position in range(1, len(item.ids)):
            found += [
                (start + position - 1, int(item.ids[position]), weight, sample)
                for first, length, weight in item.runs
                if first <= position < first + length
            ]
        start += len(item.ids)
    return found


@st.composite
def sequences_of_a_batch(draw: st.DrawFn) -> list[tuple[int, TokenSequence]]:
    items: list[tuple[int, TokenSequence]] = []
    for _ in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 9))
        edges = sorted(draw(st.sets(st.integers(0, length), max_size=6)))
        pairs = zip(edges[::2], edges[1::2], strict=False)
        weights = st.sampled_from([0.25, 0.5, 1.0])
        runs = tuple((first, stop - first, draw(weights)) for first, stop in pairs)
        start = draw(st.integers(0, 1000))
        items.append((draw(st.integers(0, 99)), sequence(length, *runs, start=start)))
    return items


@settings(max_examples=150, deadline=None, derandomize=True)
@given(sequences_of_a_batch())
def test_build_batch_is_the_naive_loop(sequences: list[tuple[int, TokenSequence]]) -> None:
    batch = build_batch(sequences)
    rows = zip(
        batch.row_N.tolist(),
        batch.target_N.tolist(),
        batch.weight_N.tolist(),
        batch.sample_N.tolist(),
        strict=True,
    )
    assert list(rows) == naive(sequences)
    assert batch.ids_T.tolist() == [token for _, s in sequences for token in s.ids.tolist()]
    assert batch.position_T.tolist() == [p for _, s in sequences for p in range(len(s.ids))]
    assert batch.segments.lengths == tuple(len(s.ids) for _, s in sequences)
    assert batch.num_tokens == sum(batch.segments.lengths)


def test_kinds_of_tensors() -> None:
    batch = build_batch([(0, sequence(3, (1, 2, 1.0)))])
    kinds = [batch.ids_T, batch.position_T, batch.row_N, batch.target_N, batch.sample_N]
    assert {tensor.dtype for tensor in kinds} == {torch.int64}
    assert batch.weight_N.dtype == torch.float32


def test_a_supervised_first_token_has_no_predictor() -> None:
    batch = build_batch([(5, sequence(3, start=10)), (6, sequence(4, (0, 3, 1.0), start=20))])
    assert batch.row_N.tolist() == [3, 4]
    assert batch.target_N.tolist() == [21, 22]


def test_segments_of_one_token() -> None:
    batch = build_batch([(0, sequence(1)), (1, sequence(1, (0, 1, 1.0))), (2, sequence(1))])
    assert batch.row_N.tolist() == []
    assert batch.position_T.tolist() == [0, 0, 0]
    assert batch.segments.starts == (0, 1, 2, 3)


def test_nothing_supervised() -> None:
    batch = build_batch([(0, sequence(4)), (1, sequence(2))])
    for tensor in (batch.row_N, batch.target_N, batch.weight_N, batch.sample_N):
        assert tensor.numel() == 0
    assert batch.num_tokens == 6


def test_the_segment_table() -> None:
    segments = build_batch([(0, sequence(n)) for n in (3, 3, 2, 1, 1, 1, 3)]).segments
    assert segments.starts == (0, 3, 6, 8, 9, 10, 11, 14)
    assert segments.longest == 3
    assert segments.runs == ((0, 2, 3), (6, 1, 2), (8, 3, 1), (11, 1, 3))


def test_a_batch_on_another_device() -> None:
    batch = build_batch([(0, sequence(3, (1, 2, 1.0)))])
    moved = batch.to(torch.device("meta"))
    names = ["ids_T", "position_T", "row_N", "target_N", "weight_N", "sample_N"]
    assert {getattr(moved, name).device.type for name in names} == {"meta"}
    assert moved.segments is batch.segments


def test_last_rows_are_those_of_the_last_tokens() -> None:
    tails = ([7, 8], [7, 9, 10], [7, 8])
    ids = [np.array([1, 2, 3, 4, *tail], dtype=np.int32) for tail in tails]
    sequences = [(n, TokenSequence(each, ((len(each) - 1, 1, 1.0),))) for n, each in enumerate(ids)]
    for shares in (False, True):
        for forest in pack_groups([ids], 1000, share_prefixes=shares):
            batch = build_batch(sequences, forest, group_size=3)
            last_GK = batch.last_S[batch.group_GK]
            assert batch.ids_T[last_GK].tolist() == [[8, 10, 8]]
            assert len(set(last_GK.flatten().tolist())) == 3
            assert batch.position_T[last_GK].tolist() == [[5, 6, 5]]


# Samples of several sequences

Ids = npt.NDArray[np.int32]


@st.composite
def samples_of_pairs(draw: st.DrawFn) -> list[list[Ids]]:
    """Pairs whose prompts go on from a few beginnings, which go on from each other."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = st.integers(2, 40)

    def longer(start: Ids) -> Ids:
        most = draw(st.sampled_from([2, 1000]))
        return np.concatenate([start, rng.integers(0, most, draw(lengths))]).astype(np.int32)

    beginnings = [np.empty(0, dtype=np.int32)]
    samples: list[list[Ids]] = []
    for _ in range(draw(st.integers(1, 12))):
        prompt = draw(st.sampled_from(beginnings))
        if draw(st.booleans()):
            prompt = longer(prompt)
            beginnings.append(prompt)
        samples.append([longer(prompt), longer(prompt)])
    return samples


def stored(forest: list[Branch]) -> int:
    return sum(branch.num_stored for branch in forest)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(samples_of_pairs(), st.integers(20, 400), st.booleans())
def test_samples_stay_together_within_the_budget(
    samples: list[list[Ids]], budget: int, shares: bool
) -> None:
    bins = pack_groups(samples, budget, share_prefixes=shares)
    rows = [(n // 2, ids) for n, ids in enumerate(ids for each in samples for ids in each)]
    whole = [(n, TokenSequence(ids, ((len(ids) - 1, 1, 1.0),))) for n, ids in rows]
    seen: list[int] = []
    for forest in bins:
        batch = build_batch(whole, forest, group_size=2)
        assert batch.num_stored_tokens == stored(forest)
        assert stored(forest) <= budget or len(batch.group_GK) == 1
        leaves = sorted(leaf.sequence for branch in forest for leaf in branch.leaves())
        assert batch.num_tokens == sum(len(rows[leaf][1]) for leaf in leaves)
        own = list(dict.fromkeys(leaf // 2 for leaf in leaves))
        assert leaves == [2 * sample + side for sample in own for side in (0, 1)]
        seen += own
        # Each sample finds its own two answers, in their order.
        last_GK = batch.last_S[batch.group_GK]
        ends = [[int(ids[-1]) for ids in samples[sample]] for sample in own]
        assert batch.ids_T[last_GK].tolist() == ends
        lengths = [[len(ids) - 1 for ids in samples[sample]] for sample in own]
        assert batch.position_T[last_GK].tolist() == lengths
        assert batch.sample_N.tolist() == [own[i // 2] for i in order_in(batch.group_GK)]
        read_back(batch, sorted(rows[leaf][1].tolist() for leaf in leaves))
    assert sorted(seen) == list(range(len(samples)))
    if shares:
        separate = sum(stored(shared_prefixes(sample)) for sample in samples)
        plain = sum(len(ids) for _, ids in rows)
        assert sum(map(stored, bins)) <= separate + 0.03 * plain
    else:
        assert not any(branch.children for forest in bins for branch in forest)
    assert bins == pack_groups(samples, budget, share_prefixes=shares)


def order_in(group_GK: torch.Tensor) -> list[int]:
    """Places of sequences in the groups, in the order of the batch."""
    return torch.argsort(group_GK.flatten()).tolist()


def read_back(batch: PackedBatch, expected: list[list[int]]) -> None:
    """Every sequence by the path to its segment."""
    segments, found = batch.segments, list[list[int]]()
    for segment in set(range(len(segments.lengths))) - set(segments.parents):
        path = (*segments.ancestors(segment), segment)
        rows = [r for one in path for r in range(segments.starts[one], segments.starts[one + 1])]
        assert batch.position_T[rows].tolist() == list(range(len(rows)))
        found.append(batch.ids_T[rows].tolist())
    assert sorted(found) == expected


def test_ten_pairs_of_one_prompt() -> None:
    """The prompt is there once, where each pair had a copy: 2,160 of 6,000 tokens are left."""
    rng = np.random.default_rng(0)

    def tokens(count: int) -> Ids:
        return rng.integers(0, 1000, count).astype(np.int32)

    prompt = tokens(200)
    pairs = [[np.concatenate([prompt, tokens(100)]) for _ in range(2)] for _ in range(10)]
    pairs[3][1][200:240] = pairs[3][0][200:240]  # the answers of one pair begin alike, too
    (forest,) = pack_groups(pairs, 4096, share_prefixes=True)
    assert (stored(forest), sum(len(ids) for pair in pairs for ids in pair)) == (2160, 6000)
    (root,) = forest
    assert root.stop == 200
    assert [len(child.children) for child in root.children].count(0) == 18
    assert sum(stored(shared_prefixes(pair)) for pair in pairs) == 10 * 400 - 40
    # A budget that cannot hold them all: each bin has its own copy of the prompt.
    bins = pack_groups(pairs, 1000, share_prefixes=True)
    assert sorted(map(stored, bins)) == [560, 1000, 1000]


def test_samples_without_a_common_beginning_share_none() -> None:
    one, other = np.arange(50, dtype=np.int32), np.arange(100, 150, dtype=np.int32)
    (forest,) = pack_groups([[one, other], [other, one]], 1000, share_prefixes=True)
    assert [(b.sequence, b.first, b.stop, b.children) for b in forest] == [
        (number, 0, 50, ()) for number in range(4)
    ]
