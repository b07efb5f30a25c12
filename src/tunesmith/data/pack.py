"""Packs sequences into padding-free micro-batches."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tunesmith.data.prefixes import Branch, shared_prefixes, whole
from tunesmith.data.tokenize import TokenSequence
from tunesmith.types import PackedBatch, Segments

LEAST_SAVED = 0.03
"""Share of a batch's tokens that shared prefixes must save: below it they are not worth the extra
segments."""


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Groups sequences into bins of at most `budget` tokens: best fit, longest first.

    A sequence longer than the budget gets a bin of its own, an empty one counts as one token. The
    same lengths give the same bins.

    Returns:
        the bins as lists of indices, longest sequence first.
    """
    sizes = np.maximum(np.asarray(lengths, dtype=np.int64), 1)
    longest_first = np.argsort(-sizes, kind="stable")
    values, counts = np.unique(sizes, return_counts=True)
    bins = _Bins(budget)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        bins.place(length, count)
    bin_of = bins.of_placed()
    ends = np.cumsum(np.bincount(bin_of, minlength=bins.num_bins)).tolist()
    members: list[int] = longest_first[np.argsort(bin_of, kind="stable")].tolist()
    return [members[start:end] for start, end in pairwise([0, *ends])]


class _Bins:
    """Bins being filled with longer before shorter sequences; they are numbered as they open.

    Neighbors that hold the same lengths are kept as one run (first bin, number of bins). Equal
    lengths split few runs, so a million sequences make some ten thousand runs to search.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.num_bins = 0
        self._rooms: list[int] = []  # tokens left in open bins: distinct, ascending
        self._runs: dict[int, list[tuple[int, int]]] = {}  # by room, each list a heap
        self._placed: list[tuple[int, int, int]] = []  # (first bin, bins, sequences in each)

    def place(self, length: int, count: int) -> None:
        """Puts `count` sequences of one length each where the least room is left."""
        while count:
            place = bisect_left(self._rooms, length)
            if place == len(self._rooms):
                # An opened bin is a bin with all its room; a sequence over the budget fills one.
                room = max(self.budget, length)
                run = (self.num_bins, -(-count // (room // length)))
                self.num_bins += run[1]
            else:
                room = self._rooms[place]
                run = heappop(self._runs[room])
                if not self._runs[room]:
                    del self._runs[self._rooms.pop(place)]
            count -= self._fill(run, room, length, count)

    def _fill(self, run: tuple[int, int], room: int, length: int, count: int) -> int:
        """Places up to `count` sequences in a run of equal bins and returns how many.

        A bin that took one has the least room of all that fit, so it takes the next one too, until
        it is full; then comes its neighbor.
        """
        first, num_bins = run
        each = room // length
        num_full = min(num_bins, count // each)
        rest = count - num_full * each if num_full < num_bins else 0
        for bins, sequences in ((num_full, each), (int(rest > 0), rest)):
            if bins:
                self._placed.append((first, bins, sequences))
                self._add((first, bins), room - sequences * length)
                first += bins
        if first < sum(run):
            self._add((first, sum(run) - first), room)
        return num_full * each + rest

    def _add(self, run: tuple[int, int], room: int) -> None:
        if room not in self._runs:
            if room == 0:
                return
            self._runs[room] = []
            insort(self._rooms, room)
        heappush(self._runs[room], run)

    def of_placed(self) -> npt.NDArray[np.int64]:
        """The bin of each sequence, in the order they were placed."""
        placed = np.array(self._placed, dtype=np.int64).reshape(-1, 3)
        first, bins, sequences = placed.T
        before = np.cumsum(bins) - bins
        numbers = np.arange(bins.sum()) + np.repeat(first - before, bins)
        return np.repeat(numbers, np.repeat(sequences, bins))


def pack_sequences(
    sequences: Sequence[npt.NDArray[np.int32]], budget: int, *, share_prefixes: bool
) -> list[list[Branch]]:
    """Groups sequences into bins of at most `budget` tokens, with shared prefixes counted once.

    Sequences with a common prefix go into the same bin as far as it has room. Prefixes are shared
    only where that saves at least `LEAST_SAVED` of the tokens. A sequence longer than the budget
    gets a bin of its own.

    Returns:
        the bins, each a forest for `build_batch`; every sequence is in one of them.
    """
    alone = whole(sequences)
    forest = shared_prefixes(sequences) if share_prefixes else alone
    if not _is_worth_it(forest, alone):
        forest = alone
    parts = [part for branch in forest for part in _fitting(branch, budget)]
    bins = _binned(parts, budget)
    return [_unshared(members, alone, budget) for members in bins]


def pack_groups(
    groups: Sequence[Sequence[npt.NDArray[np.int32]]], budget: int, *, share_prefixes: bool
) -> list[list[Branch]]:
    """Groups sequences into bins of at most `budget` tokens that keep those of a sample together.

    What sequences have in common at their beginnings counts once: within a sample, and between the
    samples of a bin, each where that saves at least `LEAST_SAVED` of the tokens. A sample larger
    than the budget gets a bin of its own.

    Args:
        groups: the sequences of each sample.
        budget: tokens of a bin.
        share_prefixes: whether to compute common beginnings once.

    Returns:
        the bins, each a forest for `build_batch`; sequences are numbered through all samples.
    """
    forests: list[list[Branch]] = []
    outlines: list[npt.NDArray[np.int32]] = []
    first = 0
    for number, group in enumerate(groups):
        alone = whole(group)
        forest = shared_prefixes(group) if share_prefixes else alone
        chosen = forest if _is_worth_it(forest, alone) else alone
        outlines.append(_outline(group, chosen, number))
        forests.append([branch.renumbered(first) for branch in chosen])
        first += len(group)
    bins = pack_sequences(outlines, budget, share_prefixes=share_prefixes)
    return [[b for branch in members for b in _grafted(branch, forests)] for members in bins]


def _outline(
    group: Sequence[npt.NDArray[np.int32]], forest: Sequence[Branch], number: int
) -> npt.NDArray[np.int32]:
    """One sequence as long as a sample's forest, with what is common to all of the sample first.

    The rest of it is a token that no other sample has, so nothing behind that is ever shared.
    """
    common = group[forest[0].sequence][: forest[0].stop] if len(forest) == 1 else group[0][:0]
    rest = sum(branch.num_stored for branch in forest) - len(common)
    return np.concatenate([common, np.full(rest, -1 - number, dtype=np.int32)])


def _grafted(branch: Branch, forests: Sequence[Sequence[Branch]]) -> Sequence[Branch]:
    """A branch of outlines with the forests that they stand for at its ends."""
    if branch.children:
        children = [part for child in branch.children for part in _grafted(child, forests)]
        return [Branch(children[0].sequence, branch.first, branch.stop, tuple(children))]
    forest = forests[branch.sequence]
    if not branch.first:
        return forest
    (only,) = forest
    return only.children if branch.first == only.stop else [replace(only, first=branch.first)]


def _is_worth_it(forest: Sequence[Branch], alone: Sequence[Branch]) -> bool:
    total = sum(branch.num_stored for branch in alone)
    return total - sum(branch.num_stored for branch in forest) >= LEAST_SAVED * total


def _fitting(branch: Branch, budget: int) -> list[Branch]:
    """The branch in parts of at most `budget` tokens; each has its own copy of the prefix."""
    if branch.num_stored <= budget or not branch.children:
        return [branch]
    left = budget - (branch.stop - branch.first)
    parts = [part for child in branch.children for part in _fitting(child, left)]
    return [branch.with_children(members) for members in _binned(parts, left)]


def _binned(parts: Sequence[Branch], budget: int) -> list[list[Branch]]:
    bins = pack([part.num_stored for part in parts], budget)
    return [[parts[index] for index in members] for members in bins]


def _unshared(members: list[Branch], alone: Sequence[Branch], budget: int) -> list[Branch]:
    """A bin without sharing, if it saves too little there and the bin has the room."""
    leaves = [alone[leaf.sequence] for branch in members for leaf in branch.leaves()]
    if _is_worth_it(members, leaves) or sum(leaf.num_stored for leaf in leaves) > budget:
        return members
    return leaves


def build_batch(
    sequences: Sequence[tuple[int, TokenSequence]],
    forest: Sequence[Branch] | None = None,
    *,
    multiple_of: int = 1,
    group_size: int = 0,
    labels: Mapping[int, float] | None = None,
    references: npt.NDArray[np.floating[Any]] | None = None,
    classes: Mapping[int, int] | None = None,
) -> PackedBatch:
    """Lays (sample id, sequence) pairs end to end.

    Token `j` of a sequence is predicted by row `j - 1` of it; a supervised first token has no
    predictor and is left out. Each sequence has entries of its own for its supervised tokens, also
    where their rows belong to a shared prefix.

    Args:
        sequences: pairs of sample id and tokens.
        forest: the order and the shared prefixes; by default all in the given order, each whole.
        multiple_of: the stream is filled up to a multiple of it with a segment of token 0 that
            carries no loss: a processor's library makes its kernels anew for every size.
        group_size: sequences of a sample, which an objective compares; 0 where it does not.
        labels: of rated samples.
        references: of each sequence, its log-probability before training.
        classes: of samples to classify: the last token of each sequence, and no other, predicts
            its sample's, with weight 1.
    """
    if forest is None:
        forest = whole([sequence.ids for _, sequence in sequences])
    layout = _Layout(sequences, classes)
    for branch in forest:
        layout.add(branch, parent=-1, before=[])
    leaves = [leaf.sequence for branch in forest for leaf in branch.leaves()]
    num_tokens = sum(len(sequences[leaf][1].ids) for leaf in leaves)
    layout.fill_up(multiple_of)
    weight_N = _joined(layout.weights, np.float32)
    # A sample's sequences stand in the list one after the other, in its own order.
    groups = np.array(sorted(leaves) if group_size else [], dtype=np.int64)
    groups = groups.reshape(-1, max(group_size, 1))
    places = np.zeros(len(sequences), dtype=np.int64)
    places[leaves] = np.arange(len(leaves))
    samples = [sequences[int(first)][0] for first in groups[:, 0]]
    return PackedBatch(
        ids_T=_joined(layout.ids, np.int64),
        position_T=_joined(layout.positions, np.int64),
        segments=Segments(tuple(layout.lengths), _parents(layout.parents)),
        row_N=_joined(layout.rows, np.int64),
        target_N=_joined(layout.targets, np.int64),
        weight_N=weight_N,
        sample_N=_joined(layout.samples, np.int64),
        sequence_N=torch.from_numpy(places[_joined(layout.sequence_numbers, np.int64).numpy()]),
        last_S=torch.tensor(layout.last_rows, dtype=torch.int64),
        group_GK=torch.from_numpy(places[groups]),
        label_G=torch.tensor([labels[sample] for sample in samples] if labels else []),
        num_tokens=num_tokens,
        loss_weight=float(len(groups)) if group_size else float(weight_N.double().sum()),
        reference_S=None if references is None else torch.from_numpy(references[leaves]),
    )


def mismatched(sequence: TokenSequence, other: TokenSequence, max_length: int) -> TokenSequence:
    """The last answer of `other` behind the prompt of `sequence`, cut at `max_length` tokens.

    Both have an answer, `sequence` one that begins before `max_length`; a prompt is all that
    stands before the last one.
    """
    start, (first, count, weight) = sequence.runs[-1][0], other.runs[-1]
    count = min(count, max_length - start)
    ids = np.concatenate([sequence.ids[:start], other.ids[first : first + count]])
    return TokenSequence(ids, ((start, count, weight),))


class _Layout:
    """The stream and the list of what is supervised, growing branch by branch."""

    def __init__(
        self,
        sequences: Sequence[tuple[int, TokenSequence]],
        classes: Mapping[int, int] | None = None,
    ) -> None:
        self.sequences = sequences
        self.classes = classes
        self.num_rows = 0
        self.lengths: list[int] = []
        self.parents: list[int] = []
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.rows: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.samples: list[np.ndarray] = []
        self.sequence_numbers: list[np.ndarray] = []
        self.last_rows: list[int] = []

    def add(self, branch: Branch, parent: int, before: list[np.ndarray]) -> None:
        """Appends a branch and its children; `before` holds the rows of its ancestors."""
        sample, sequence = self.sequences[branch.sequence]
        segment, length = len(self.lengths), branch.stop - branch.first
        rows = [*before, np.arange(self.num_rows, self.num_rows + length)]
        self._append(
            sequence.ids[branch.first : branch.stop], np.arange(branch.first, branch.stop), parent
        )
        for child in branch.children:
            self.add(child, segment, rows)
        if not branch.children:
            self._supervise(sample, branch.sequence, np.concatenate(rows))

    def fill_up(self, multiple_of: int) -> None:
        """Appends the segment that makes the number of rows a multiple."""
        count = -self.num_rows % multiple_of
        if count:
            self._append(np.zeros(count, dtype=np.int64), np.arange(count), parent=-1)

    def _append(self, ids: np.ndarray, positions: np.ndarray, parent: int) -> None:
        self.ids.append(ids)
        self.positions.append(positions)
        self.lengths.append(len(ids))
        self.parents.append(parent)
        self.num_rows += len(ids)

    def _supervise(self, sample: int, number: int, rows: np.ndarray) -> None:
        """Lists a sequence's supervised tokens; `rows` are the rows of all its tokens."""
        sequence = self.sequences[number][1]
        self.last_rows.append(int(rows[-1]))
        if self.classes is not None:
            target = np.array([self.classes[sample]])
            self._predict((sample, number), rows[-1:], target, 1.0)
            return
        for first, count, weight in sequence.runs:
            begin, end = max(first, 1), first + count
            self._predict(
                (sample, number), rows[begin - 1 : end - 1], sequence.ids[begin:end], weight
            )

    def _predict(
        self, owner: tuple[int, int], rows: np.ndarray, targets: np.ndarray, weight: float
    ) -> None:
        """Lists rows with what they predict, for the (sample, sequence) that they belong to."""
        self.rows.append(rows)
        self.targets.append(targets)
        self.weights.append(np.full(len(rows), weight))
        self.samples.append(np.full(len(rows), owner[0]))
        self.sequence_numbers.append(np.full(len(rows), owner[1]))


def _joined(parts: Sequence[np.ndarray], dtype: npt.DTypeLike) -> torch.Tensor:
    if not parts:
        return torch.from_numpy(np.empty(0, dtype=dtype))
    return torch.from_numpy(np.concatenate(parts).astype(dtype))


def _parents(parents: list[int]) -> tuple[int, ...]:
    return tuple(parents) if any(parent >= 0 for parent in parents) else ()
