"""A hash of each sample's tokens, for many samples at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash_samples(
    ids: npt.NDArray[np.int32], lengths: npt.NDArray[Any], num_sequences: npt.NDArray[Any]
) -> npt.NDArray[np.uint64]:
    """Equal samples (the same tokens in the same sequences) have equal hashes.

    Every token is mixed with its place and all are added up, as are the lengths of sequences. Two
    different samples share a hash by chance once in 2^64; made on purpose, they can.

    Args:
        ids: of all sequences, end to end.
        lengths: tokens of each sequence; a sample has at least one token.
        num_sequences: sequences of each sample, at least one.
    """
    first_sequence = np.cumsum(num_sequences) - num_sequences
    first_token = (np.cumsum(lengths) - lengths)[first_sequence]
    tokens = _sums_of_places(ids, first_token)
    return mix(tokens ^ mix(_sums_of_places(lengths, first_sequence)))


def _sums_of_places(
    values: npt.NDArray[Any], starts: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint64]:
    """The sum of each group's values, each mixed with its place in the group."""
    sizes = np.diff(np.append(starts, len(values)))
    places = np.arange(len(values)) - np.repeat(starts, sizes)
    mixed = mix(values.astype(np.uint64) + (places + 1).astype(np.uint64) * GOLDEN)
    return np.add.reduceat(mixed, starts)


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al. 2014): spreads every input bit over the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
