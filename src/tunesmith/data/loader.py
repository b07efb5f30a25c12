"""The global batch of any step, a pure function of the step: nothing to save, nothing to skip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tunesmith.data.mix import Share, Strategy, mixed_order
from tunesmith.data.pack import build_batch, mismatched, pack_groups, pack_sequences
from tunesmith.data.store import TokenStore
from tunesmith.data.tokenize import TokenSequence
from tunesmith.io.fault import fault
from tunesmith.types import GlobalBatch, Origin, PackedBatch


@dataclass(frozen=True)
class Loader:
    """Batches over some samples of a store.

    Args:
        store: the token store.
        samples: the samples to use, as store numbers, source by source.
        global_batch: samples per optimizer step.
        micro_batch_tokens: token budget of a micro-batch; a shared prefix counts once in it, the
            filling of `pad_to` not at all.
        max_length: tokens of a sequence; longer ones are treated as `overlong` says.
        seed: of the order.
        shares: what each source gives to an epoch; by default all samples are one source.
        mix: how sources share an epoch.
        overlong: see `DataConfig.overlong`; what is to be dropped is not among `samples`.
        pad_to: rows of a micro-batch are filled up to a multiple of it.
        group_size: sequences of each sample, which an objective compares: they stay in one
            micro-batch, and the loss is divided by the samples. 0 where it does not.
        has_mismatched: behind the one sequence of each sample comes another, its prompt with the
            answer of the next sample of the global batch (KTO, arXiv 2402.01306 §4.1). Which one
            that is depends on the step, never on the budget; answers are cut at `max_length`.
        labels: of a classifier, in the order of its head's rows: each sequence's last token
            predicts the number of its label. Empty for other objectives.
        excluded: samples that steps leave out, where they come up.
        reference: log-probability of each sequence of the store before training; batches bring it.
        repeats: so many steps in a row have the same batch: their objective samples answers to
            it once and learns from them in several updates.
        share_prefixes: compute what sequences have in common at their beginnings once. The same
            loss and gradients, unless the model draws random numbers per token (dropout).
    """

    store: TokenStore
    samples: npt.NDArray[np.int64] = field(repr=False)
    global_batch: int
    micro_batch_tokens: int
    max_length: int
    seed: int
    shares: tuple[Share, ...] = ()
    mix: Strategy = "shuffle"
    overlong: str = "auto"
    pad_to: int = 1
    share_prefixes: bool = True
    group_size: int = 0
    has_mismatched: bool = False
    labels: tuple[str, ...] = ()
    excluded: frozenset[int] = frozenset()
    repeats: int = 1
    reference: npt.NDArray[np.floating[Any]] | None = field(default=None, repr=False)

    @property
    def samples_per_epoch(self) -> int:
        """Samples in one epoch, repeated ones included."""
        return sum(share.draws for share in self._all_shares)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass; the last one of an epoch may be smaller."""
        return -(-self.samples_per_epoch // self.global_batch) * self.repeats

    @property
    def _all_shares(self) -> tuple[Share, ...]:
        return self.shares or (Share(len(self.samples), len(self.samples)),)

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of a step, counted from 0."""
        fault("data.next", step=step)
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within // self.repeats * self.global_batch
        epoch_order = _epoch_order(self.seed, epoch, self._all_shares, self.mix)
        chosen = epoch_order[start : start + self.global_batch]
        ids = [int(sample) for sample in self.samples[chosen] if int(sample) not in self.excluded]
        micro_batches = tuple(self._pack(ids))
        return GlobalBatch(
            epoch=epoch,
            sample_ids=tuple(ids),
            micro_batches=micro_batches,
            supervised_weight=sum(batch.loss_weight for batch in micro_batches),
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
        sequences = self._sequences(sample_ids)
        if self.has_mismatched:
            sequences = self._with_mismatched(sequences)
        ids = [sequence.ids for _, sequence in sequences]
        size, labels = self.group_size + self.has_mismatched, None
        if size:
            groups = [ids[first : first + size] for first in range(0, len(ids), size)]
            bins = pack_groups(groups, self.micro_batch_tokens, share_prefixes=self.share_prefixes)
            if self.store.is_rated.any():
                labels = {sample: self.store.label(sample) for sample in sample_ids}
        else:
            bins = pack_sequences(ids, self.micro_batch_tokens, share_prefixes=self.share_prefixes)
        references = self._references(sample_ids)
        classes = self._classes(sample_ids) if self.labels else None
        for forest in bins:
            yield build_batch(
                sequences, forest,
                multiple_of=self.pad_to, group_size=size, labels=labels, references=references,
                classes=classes,
            )  # fmt: skip

    def _classes(self, sample_ids: Sequence[int]) -> dict[int, int]:
        """The number of each sample's label; those of the store are numbered as they came up."""
        names, numbers = self.store.labels, self.store.sample_labels
        return {sample: self.labels.index(names[int(numbers[sample])]) for sample in sample_ids}

    def _references(self, sample_ids: Sequence[int]) -> npt.NDArray[np.floating[Any]] | None:
        """The values of `reference` in the order of `_sequences`."""
        if self.reference is None:
            return None
        indices = [i for sample in sample_ids for i in self.store.sequences_of(sample)]
        return self.reference[indices]

    def _sequences(self, sample_ids: Sequence[int]) -> list[tuple[int, TokenSequence]]:
        return [
            (sample, self.store.sequence(index, window))
            for sample in sample_ids
            for index in self.store.sequences_of(sample)
            for window in self._windows(sample, index)
        ]

    def _with_mismatched(
        self, sequences: list[tuple[int, TokenSequence]]
    ) -> list[tuple[int, TokenSequence]]:
        """Each sample's sequence, and behind it the mismatched one."""
        others = sequences[1:] + sequences[:1]
        if len(sequences) == 1:
            others = self._sequences([self._after(sequences[0][0])])
        return [
            pair
            for (sample, own), (_, other) in zip(sequences, others, strict=True)
            for pair in ((sample, own), (sample, mismatched(own, other, self.max_length)))
        ]

    def _after(self, sample: int) -> int:
        """The next sample of all, for one that is alone in its batch; itself if it is the only."""
        place = int(np.flatnonzero(self.samples == sample)[0])
        following = np.roll(self.samples, -place - 1)
        return next(int(other) for other in following if int(other) not in self.excluded)

    def _windows(self, sample: int, sequence: int) -> list[tuple[int, int]]:
        """The parts of a sequence that are used."""
        length, most = self.store.length(sequence), self.max_length
        if length <= most:
            return [(0, length)]
        if self.overlong == "cut_left":
            return [(length - most, length)]
        if self.overlong == "split" or (self.overlong == "auto" and self.store.is_text[sample]):
            # One token is shared: the last of a piece is the first that predicts in the next.
            return [(start, min(start + most, length)) for start in range(0, length - 1, most - 1)]
        return [(0, most)]


@lru_cache(maxsize=2)
def _epoch_order(
    seed: int, epoch: int, shares: tuple[Share, ...], mix: Strategy
) -> npt.NDArray[np.int64]:
    return mixed_order(seed, epoch, shares, mix)
