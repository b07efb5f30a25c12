"""Packs sequences into padding-free micro-batches."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from tunesmith.data.tokenize import TokenSequence
from tunesmith.types import PackedBatch, Segments


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


def build_batch(sequences: Sequence[tuple[int, TokenSequence]]) -> PackedBatch:
    """Lays (sample id, sequence) pairs end to end.

    Token `j` of a sequence is predicted by row `j - 1` of it; a supervised first token has no
    predictor and is left out.
    """
    lengths = tuple(len(sequence.ids) for _, sequence in sequences)
    rows: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    samples: list[np.ndarray] = []
    start = 0
    for (sample, sequence), length in zip(sequences, lengths, strict=True):
        for first, count, weight in sequence.runs:
            skipped = int(first == 0)
            row = np.arange(start + first - 1 + skipped, start + first - 1 + count)
            rows.append(row)
            weights.append(np.full(len(row), weight, dtype=np.float32))
            samples.append(np.full(len(row), sample, dtype=np.int64))
        start += length
    ids_T = torch.from_numpy(np.concatenate([s.ids for _, s in sequences]).astype(np.int64))
    row_N = torch.from_numpy(np.concatenate(rows) if rows else np.empty(0, dtype=np.int64))
    return PackedBatch(
        ids_T=ids_T,
        position_T=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        segments=Segments(lengths),
        row_N=row_N,
        target_N=ids_T[row_N + 1],
        weight_N=torch.from_numpy(
            np.concatenate(weights) if weights else np.empty(0, dtype=np.float32)
        ),
        sample_N=torch.from_numpy(
            np.concatenate(samples) if samples else np.empty(0, dtype=np.int64)
        ),
    )
