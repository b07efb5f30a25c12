"""Which sample comes when: pure functions of the seed, so a position is one integer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tunesmith.data.hashes import mix


def order(seed: int, epoch: int, num_samples: int) -> npt.NDArray[np.int64]:
    """The order of `num_samples` samples in one epoch.

    Sorts by Philox's raw output: numpy promises that stream for all versions, while the result of
    `Generator.permutation` may change between them (NEP 19).
    """
    stream = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    return np.argsort(stream.random_raw(num_samples), kind="stable")


def stream_seed(seed: int, number: int) -> int:
    """A seed for stream `number` of a run; stream 0 has the run's own seed."""
    if number == 0:
        return seed
    # SplitMix64: steps of the golden ratio, then a bijection, so that numbers never share a seed.
    start = (seed + number * 0x9E3779B97F4A7C15) % 2**64
    return int(mix(np.array([start], dtype=np.uint64))[0])


def split_samples(
    hashes: npt.NDArray[np.uint64], num_validation: int, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Training and validation samples; equal samples (equal hashes) land on the same side.

    Stable: adding rows moves few of the old ones across. Validation has at least `num_validation`
    samples unless that would leave nothing to train on; copies can make it a few more.

    Returns:
        (training indices, validation indices), each ascending.
    """
    if num_validation <= 0 or len(hashes) == 0:
        return np.arange(len(hashes)), np.empty(0, dtype=np.int64)
    mixed = mix(np.asarray(hashes) ^ mix(np.array([seed + 1], dtype=np.uint64)))
    by_rank = np.argsort(mixed, kind="stable")
    limit = mixed[by_rank[min(num_validation, len(by_rank)) - 1]]
    held_out = mixed <= limit
    if held_out.sum() > 2 * num_validation and (mixed < limit).any():
        held_out = mixed < limit  # hundreds of copies of one sample would flood validation
    if held_out.all():
        held_out = np.zeros(len(hashes), dtype=bool)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def split_by_source(
    hashes: npt.NDArray[np.uint64],
    sources: npt.NDArray[np.int64],
    num_validation: int,
    seed: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`split_samples` stratified: each source gives its share of validation.

    Equal samples land on the same side across sources: one that several sources have counts for
    the smallest of them, which needs it most. A source with ten distinct samples of its own gives
    at least one where the number allows. None is held out whole, so validation may stay a few
    short of `num_validation`; copies can make it a few more or less.

    Args:
        hashes: of the samples.
        sources: the number of each sample's source.
        num_validation: samples to hold out.
        seed: of the choice.

    Returns:
        (training indices, validation indices), each ascending.
    """
    if len(hashes) == 0 or num_validation <= 0:
        return split_samples(hashes, num_validation, seed)
    distinct, number = np.unique(hashes, return_inverse=True)
    home_of_distinct = _smallest_source(number, sources, len(distinct))
    homes = home_of_distinct[number]
    quotas = _quotas(np.bincount(homes), np.bincount(home_of_distinct), num_validation)
    is_held_out = np.zeros(len(hashes), dtype=bool)
    for source, quota in enumerate(quotas.tolist()):
        rows = np.flatnonzero(homes == source)
        is_held_out[rows[split_samples(hashes[rows], quota, seed)[1]]] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def drop_leaked(
    train_hashes: npt.NDArray[np.uint64], validation_hashes: npt.NDArray[np.uint64]
) -> npt.NDArray[np.bool_]:
    """A mask of the training samples to drop: those that validation has too."""
    return np.isin(train_hashes, validation_hashes)


def _smallest_source(
    number: npt.NDArray[np.int64], sources: npt.NDArray[np.int64], num_distinct: int
) -> npt.NDArray[np.int64]:
    """The source with the fewest rows, and of equal ones the first, that has each distinct sample.

    Args:
        number: of each row, which distinct sample it is.
        sources: of each row.
        num_distinct: how many distinct samples there are.
    """
    by_size = np.argsort(np.bincount(sources), kind="stable")
    ranks = np.empty_like(by_size)
    ranks[by_size] = np.arange(len(by_size))
    smallest = np.full(num_distinct, len(by_size))
    np.minimum.at(smallest, number, ranks[sources])
    return by_size[smallest]


def _quotas(
    sizes: npt.NDArray[np.int64], num_distinct: npt.NDArray[np.int64], total: int
) -> npt.NDArray[np.int64]:
    """Splits `total` over groups by the largest remainder, then gives ten distinct samples one."""
    num_rows = int(sizes.sum())
    quotas = sizes * total // num_rows
    remainders = sizes * total % num_rows
    left = total - int(quotas.sum())
    quotas[np.argsort(-remainders, kind="stable")[:left]] += 1
    for group in np.flatnonzero((quotas == 0) & (num_distinct >= 10)):
        giver = int(quotas.argmax())
        if quotas[giver] >= 2:
            quotas[giver] -= 1
            quotas[group] += 1
    return quotas
