"""Which sample comes when: pure functions of the seed, so a position is one integer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def order(seed: int, epoch: int, num_samples: int) -> npt.NDArray[np.int64]:
    """The order of `num_samples` samples in one epoch.

    Sorts by Philox's raw output: numpy promises that stream for all versions, while the result of
    `Generator.permutation` may change between them (NEP 19).
    """
    stream = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    return np.argsort(stream.random_raw(num_samples), kind="stable")


def split_samples(
    hashes: npt.NDArray[np.uint64], num_validation: int, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Training and validation samples; equal samples (equal hashes) land on the same side.

    Stable: adding rows moves few of the old ones across. Validation has at least `num_validation`
    samples unless that would leave nothing to train on; copies can make it a few more.

    Returns:
        (training indices, validation indices), each ascending.
    """
    if num_validation <= 0:
        return np.arange(len(hashes)), np.empty(0, dtype=np.int64)
    mixed = _mix(np.asarray(hashes) ^ _mix(np.array([seed + 1], dtype=np.uint64)))
    by_rank = np.argsort(mixed, kind="stable")
    limit = mixed[by_rank[min(num_validation, len(by_rank)) - 1]]
    held_out = mixed <= limit
    if held_out.sum() > 2 * num_validation and (mixed < limit).any():
        held_out = mixed < limit  # hundreds of copies of one sample would flood validation
    if held_out.all():
        held_out = np.zeros(len(hashes), dtype=bool)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al. 2014): spreads every input bit over the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
