"""From sources to the samples of a run: which are trained on, which are held out, and counts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from tunesmith.config.recipe import DataConfig, SourceConfig
from tunesmith.data.mix import Share, replay_draws
from tunesmith.data.order import drop_leaked, split_by_source
from tunesmith.data.store import TokenStore
from tunesmith.errors import MAX_PROBLEMS, DataError, Problem


@dataclass(frozen=True)
class Counts:
    """Samples that are not used as they are."""

    truncated: int = 0
    split: int = 0
    dropped: int = 0
    unsupervised: int = 0
    leaked: int = 0
    bad: int = 0


@dataclass(frozen=True)
class Split:
    """Samples of a run; validation may live in a store of its own.

    `train` holds the samples source by source, `shares` how many each source gives to an epoch.
    """

    train_store: TokenStore
    validation_store: TokenStore
    train: npt.NDArray[np.int64]
    shares: tuple[Share, ...]
    validation: npt.NDArray[np.int64]
    counts: Counts
    validation_counts: Counts
    """Of validation data of its own."""


def make_split(
    data: DataConfig,
    sources: list[SourceConfig],
    stores: tuple[TokenStore, TokenStore | None],
    *,
    max_length: int,
    seed: int,
    group_size: int = 0,
    are_prompts: bool = False,
) -> Split:
    """Chooses training and validation samples.

    Left out: overlong samples where the recipe says so, samples that have no supervised token
    (within `max_length`), for they teach nothing, and training samples that are validated on.
    Rows of the replay source are not held out: validation measures the task.

    Args:
        data: the recipe's part.
        sources: of the training store, in order; with replay, its source is the last.
        stores: for training, and for validation if that has data of its own.
        max_length: tokens of a sequence.
        seed: of the choice.
        group_size: sequences that each sample must have, 0 for any number: then they are compared,
            and none may be cut.
        are_prompts: only what stands before the last answer counts, and none may be cut.

    Raises:
        DataError: nothing is left to train on (`data.nothing-to-learn`), or a sample has another
            number of sequences (`data.group-size`).
    """
    store, validation_store = stores
    if group_size:
        data = data.model_copy(update={"overlong": "drop"})
        for each in filter(None, stores):
            _check_groups(each, group_size)
    source_of = store.sample_sources
    limit = (max_length, are_prompts)
    usable, counts = _usable(store, data, *limit, "data.train")
    is_replay = source_of[usable] == (len(sources) - 1 if data.replay else -1)
    own, replay = usable[~is_replay], usable[is_replay]
    _require(own, "data.train", max_length)
    if validation_store is not None:
        validation, of_validation = _usable(validation_store, data, *limit, "data.validation")
        _require(validation, "data.validation", max_length)
        train, held_out_hashes = own, validation_store.sample_hashes[validation]
    else:
        inside, held_out = split_by_source(
            store.sample_hashes[own], store.strata[own], num_validation(data, len(own)), seed
        )
        train, validation, of_validation = own[inside], own[held_out], Counts()
        held_out_hashes = store.sample_hashes[validation]
    train, replay, num_leaked = _without_leaks(store, train, replay, held_out_hashes)
    train = np.concatenate([train, replay])
    counts = replace(counts, leaked=num_leaked)
    train = train[np.argsort(source_of[train], kind="stable")]
    shares = _shares(data, sources, np.bincount(source_of[train], minlength=len(sources)))
    return Split(store, validation_store or store, train, shares, validation, counts, of_validation)


def _check_groups(store: TokenStore, group_size: int) -> None:
    found = np.flatnonzero(store.sequences_per_sample() != group_size)
    problems = [
        Problem(
            str(store.origin(int(sample))),
            "data.group-size",
            f"{store.sequences_per_sample()[sample]} sequences: a template that shows earlier "
            "turns otherwise than later ones",
            f"{group_size}, to compare them",
        )
        for sample in found[:MAX_PROBLEMS]
    ]
    if problems:
        raise DataError(problems, num_problems=len(found), try_="data.train_on=last")


def _without_leaks(
    store: TokenStore,
    train: npt.NDArray[np.int64],
    replay: npt.NDArray[np.int64],
    held_out_hashes: npt.NDArray[np.uint64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """Training and replay samples that validation does not have, and how many it has."""
    kept = [
        samples[~drop_leaked(store.sample_hashes[samples], held_out_hashes)]
        for samples in (train, replay)
    ]
    if len(kept[0]) == 0:
        found = f"{len(train):,} training samples, all of which are validation samples, too"
        raise DataError([Problem("data.validation", "data.leak", found, "other rows to train on")])
    return kept[0], kept[1], len(train) + len(replay) - len(kept[0]) - len(kept[1])


def _shares(
    data: DataConfig, sources: list[SourceConfig], sizes: npt.NDArray[np.int64]
) -> tuple[Share, ...]:
    """How many samples each source gives to an epoch."""
    shares = [
        Share.by_weight(size, source.weight)
        if source.count is None
        else Share.by_count(size, source.count)
        for source, size in zip(sources, sizes.tolist(), strict=True)
    ]
    if data.replay is not None:
        num_others = sum(share.draws for share in shares[:-1])
        shares[-1] = Share.by_count(shares[-1].size, replay_draws(num_others, data.replay.share))
    return tuple(shares)


def num_validation(data: DataConfig, num_samples: int) -> int:
    """Samples to hold out of `num_samples`, by the recipe's share or number."""
    wanted = data.validation
    if isinstance(wanted, float):
        return min(max(1, round(wanted * num_samples)), num_samples - 1)
    if isinstance(wanted, int):
        if wanted >= num_samples > 0:
            found = f"{wanted:,} rows to hold out of {num_samples:,}"
            raise DataError(
                [Problem("data.validation", "data.validation-size", found, "fewer than there are")],
                try_="a share such as data.validation=0.1",
            )
        return wanted
    return 0


def _require(samples: npt.NDArray[np.int64], where: str, max_length: int) -> None:
    if len(samples) == 0:
        found = f"no sample with a supervised token within {max_length} tokens"
        raise DataError(
            [Problem(where, "data.nothing-to-learn", found, "at least one")],
            try_="raise data.max_length, or look at the rows with `tunesmith preview`",
        )


MOST_WITHOUT_ANSWER = 0.01
"""Of the samples, so many may lose their whole answer to the length limit without an error."""


def _check_cut_prompts(count: int, num_samples: int, max_length: int, where: str) -> None:
    """Refuses to go on without more than a few of the rows: the limit is not what was meant."""
    if count > MOST_WITHOUT_ANSWER * num_samples and count < num_samples:
        found = (
            f"{count:,} of {num_samples:,} samples of {where} whose prompt alone has {max_length} "
            "tokens or more: nothing of the answer would be left"
        )
        raise DataError(
            [Problem("data.max_length", "data.overlong", found, "at most 1 % of them")],
            try_="raise data.max_length; data.overlong: cut_left keeps the answers, drop leaves "
            "overlong rows out",
        )


def _usable(
    store: TokenStore, data: DataConfig, max_length: int, are_prompts: bool, where: str
) -> tuple[npt.NDArray[np.int64], Counts]:
    """The samples to use, and what becomes of the others."""
    lengths = store.prompts_of_samples() if are_prompts else store.longest_of_samples()
    is_overlong = lengths > max_length
    is_dropped = is_overlong & (are_prompts or data.overlong == "drop")
    is_split = is_overlong & (
        (data.overlong == "split") | (store.is_text & (data.overlong == "auto"))
    )
    # Only a cut at the end can take all that is supervised away.
    is_cut = is_overlong & ~is_dropped & ~is_split
    first = store.first_answer_of_samples()
    has_nothing = is_cut & (first >= max_length) & (data.overlong != "cut_left")
    _check_cut_prompts(int(has_nothing.sum()), store.num_samples, max_length, where)
    keep = ~is_dropped & ~has_nothing
    counts = Counts(
        truncated=int((is_cut & keep).sum()),
        split=int(is_split.sum()),
        dropped=int(is_dropped.sum()),
        unsupervised=int(has_nothing.sum()) + store.num_silent,
        bad=store.num_bad,
    )
    return np.flatnonzero(keep), counts
