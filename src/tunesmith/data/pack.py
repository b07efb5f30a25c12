"""Packs sequences into padding-free micro-batches."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch

from tunesmith.data.tokenize import TokenSequence
from tunesmith.types import PackedBatch, Segments


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Groups sequences into bins of at most `budget` tokens: best fit, longest first.

    A sequence longer than the budget gets a bin of its own. The same lengths give the same bins.

    Returns:
        the bins as lists of indices, longest sequence first.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        place = bisect_left(room, (length, -1))
        if place == len(room):
            bins.append([index])
            insort(room, (max(budget - length, 0), len(bins) - 1))
        else:
            left, number = room.pop(place)
            bins[number].append(index)
            insort(room, (left - length, number))
    return bins


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
