"""The global batch of any step, a pure function of the step: nothing to save, nothing to skip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tunesmith.data.order import order
from tunesmith.data.pack import build_batch, pack
from tunesmith.data.store import TokenStore
from tunesmith.data.tokenize import TokenSequence
from tunesmith.types import GlobalBatch, Origin, PackedBatch


@dataclass(frozen=True)
class Loader:
    """Batches over some samples of a store.

    Args:
        store: the token store.
        samples: the samples to use, as store numbers.
        global_batch: samples per optimizer step.
        micro_batch_tokens: token budget of a micro-batch.
        max_length: tokens of a sequence beyond which its end is cut off.
        seed: of the order.
    """

    store: TokenStore
    samples: npt.NDArray[np.int64] = field(repr=False)
    global_batch: int
    micro_batch_tokens: int
    max_length: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass; the last one of an epoch may be smaller."""
        return -(-len(self.samples) // self.global_batch)

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of a step, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.global_batch
        chosen = _epoch_order(self.seed, epoch, len(self.samples))[
            start : start + self.global_batch
        ]
        ids = [int(sample) for sample in self.samples[chosen]]
        micro_batches = tuple(self._pack(ids))
        return GlobalBatch(
            epoch=epoch,
            sample_ids=tuple(ids),
            micro_batches=micro_batches,
            supervised_weight=sum(float(b.weight_N.double().sum()) for b in micro_batches),
            num_supervised=sum(int(b.row_N.numel()) for b in micro_batches),
            num_tokens=sum(b.num_tokens for b in micro_batches),
        )

    def all_batches(self) -> Iterator[PackedBatch]:
        """Every sample once in file order, for evaluation."""
        # A window of samples is sorted by length at a time, so that packs are full and the
        # whole set never stands in memory.
        window = max(self.global_batch, 256)
        for start in range(0, len(self.samples), window):
            yield from self._pack([int(s) for s in self.samples[start : start + window]])

    def origins(self, sample_ids: Sequence[int]) -> list[Origin]:
        """Where samples came from."""
        return [self.store.origin(sample) for sample in sample_ids]

    def _pack(self, sample_ids: Sequence[int]) -> Iterator[PackedBatch]:
        sequences: list[tuple[int, TokenSequence]] = [
            (sample, self.store.sequence(index, self.max_length))
            for sample in sample_ids
            for index in self.store.sequences_of(sample)
        ]
        lengths = [len(sequence.ids) for _, sequence in sequences]
        for members in pack(lengths, self.micro_batch_tokens):
            yield build_batch([sequences[member] for member in members])


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_samples: int) -> npt.NDArray[np.int64]:
    return order(seed, epoch, num_samples)
