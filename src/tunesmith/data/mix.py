"""Several sources in one epoch: pure functions of (seed, epoch), so a position is one integer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tunesmith.data.order import order, stream_seed

Strategy = Literal["shuffle", "concat", "interleave"]
"""How sources share an epoch: at random places, one after another, or evenly spread."""

_PLACES = -1  # the stream of random numbers that says which source stands where


@dataclass(frozen=True)
class Share:
    """What one source gives: `draws` samples per epoch out of `size`."""

    size: int
    draws: int

    @classmethod
    def by_weight(cls, size: int, weight: float) -> Share:
        """A source of which an epoch takes `weight` times its size, at least one sample."""
        return cls.by_count(size, round(weight * size))

    @classmethod
    def by_count(cls, size: int, count: int) -> Share:
        """A source of which an epoch takes `count` samples, at least one; none of an empty one."""
        return cls(size, max(count, 1) if size > 0 else 0)


def mixed_order(
    seed: int, epoch: int, shares: Sequence[Share], strategy: Strategy
) -> npt.NDArray[np.int64]:
    """The order of one epoch over several sources.

    Each source is an endless line of shuffled passes over its samples, of which every epoch takes
    the next `draws`. No sample comes again before all of its source came, so over any number of
    epochs two samples of a source are seen equally often, or one of them once more. The strategy
    only places the sources; within a source the line keeps its order. One source of weight 1 has
    the order of `order(seed, epoch, size)`.

    Returns:
        sample numbers, counted through all sources in the order given.
    """
    starts = np.cumsum([0] + [share.size for share in shares])
    drawn = [
        starts[number] + _draw(stream_seed(seed, number), epoch, share)
        for number, share in enumerate(shares)
    ]
    in_line = np.concatenate([np.empty(0, dtype=np.int64), *drawn])
    if strategy == "concat" or len(shares) <= 1:
        return in_line
    draws = [share.draws for share in shares]
    if strategy == "interleave":
        # The k-th of n draws stands at (k + 1/2) / n of the epoch; ties go to the earlier source.
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in draws])
        return in_line[np.argsort(places, kind="stable")]
    # 16 bits, where sources allow, make the second sort a counting one.
    labels = np.repeat(np.arange(len(draws), dtype=np.min_scalar_type(len(draws))), draws)
    labels = labels[order(stream_seed(seed, _PLACES), epoch, len(labels))]
    mixed = np.empty_like(in_line)
    mixed[np.argsort(labels, kind="stable")] = in_line
    return mixed


def _draw(seed: int, epoch: int, share: Share) -> npt.NDArray[np.int64]:
    """The samples of one source in one epoch, in the order of its endless line."""
    if share.draws == 0:
        return np.empty(0, dtype=np.int64)
    start = epoch * share.draws
    first, skipped = divmod(start, share.size)
    last = (start + share.draws - 1) // share.size
    passes = [order(seed, number, share.size) for number in range(first, last + 1)]
    return np.concatenate(passes)[skipped : skipped + share.draws]


def replay_draws(num_draws: int, share: float) -> int:
    """Draws that make up `share` (below 1) of a mixture with `num_draws` others.

    A share above nothing takes at least one.
    """
    if share == 0 or num_draws == 0:
        return 0
    return max(1, round(num_draws * share / (1 - share)))


def share_of_rank(
    global_batch_ids: npt.NDArray[np.int64], rank: int, world_size: int
) -> npt.NDArray[np.int64]:
    """The samples of a global batch that fall to one rank: every `world_size`-th.

    The global batch is the same for any world size, so a run may go on with more or fewer cards.
    Ranks differ by at most one sample; one beyond the samples of a small batch gets none.
    """
    return global_batch_ids[rank::world_size]
