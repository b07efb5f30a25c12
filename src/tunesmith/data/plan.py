"""From sources to the samples of a run: which are trained on, which are held out, and counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tunesmith.config.recipe import DataConfig
from tunesmith.data.order import split_samples
from tunesmith.data.store import TokenStore
from tunesmith.errors import DataError, Problem


@dataclass(frozen=True)
class Split:
    """Samples of a run; validation may live in a store of its own."""

    train_store: TokenStore
    validation_store: TokenStore
    train: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    num_truncated: int
    num_dropped: int
    num_unsupervised: int


def make_split(
    data: DataConfig,
    store: TokenStore,
    validation_store: TokenStore | None,
    *,
    max_length: int,
    seed: int,
) -> Split:
    """Chooses training and validation samples.

    Left out: overlong samples where the recipe says so, and samples that have no supervised token
    (within `max_length`), for they teach nothing.

    Raises:
        DataError: nothing is left to train on (`data.nothing-to-learn`).
    """
    usable, counts = _usable(store, data, max_length)
    _require(usable, "data.train", max_length)
    if validation_store is not None:
        train = usable
        validation, _ = _usable(validation_store, data, max_length)
        _require(validation, "data.validation", max_length)
    else:
        count = num_validation(data, len(usable))
        inside, held_out = split_samples(store.sample_hashes[usable], count, seed)
        train, validation = usable[inside], usable[held_out]
    return Split(store, validation_store or store, train, validation, *counts)


def num_validation(data: DataConfig, num_samples: int) -> int:
    """Samples to hold out of `num_samples`, by the recipe's share or number."""
    wanted = data.validation
    if isinstance(wanted, float):
        return min(max(1, round(wanted * num_samples)), num_samples - 1)
    if isinstance(wanted, int):
        return min(wanted, num_samples - 1)
    return 0


def _require(samples: npt.NDArray[np.int64], where: str, max_length: int) -> None:
    if len(samples) == 0:
        found = f"no sample with a supervised token within {max_length} tokens"
        raise DataError(
            [Problem(where, "data.nothing-to-learn", found, "at least one")],
            try_="raise data.max_length, or look at the rows with `tunesmith preview`",
        )


def _usable(
    store: TokenStore, data: DataConfig, max_length: int
) -> tuple[npt.NDArray[np.int64], tuple[int, int, int]]:
    """The samples to use, and how many are (truncated, dropped, without anything to learn)."""
    is_overlong = store.longest_of_samples() > max_length
    is_dropped = is_overlong & (data.overlong == "drop")
    has_nothing = (store.first_supervised_of_samples() >= max_length) & ~is_dropped
    keep = ~is_dropped & ~has_nothing
    counts = (
        int((is_overlong & keep).sum()),
        int(is_dropped.sum()),
        int(has_nothing.sum()) + store.num_silent,
    )
    return np.flatnonzero(keep), counts
