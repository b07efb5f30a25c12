"""Packs sampled answers into micro-batches, those to one prompt behind one copy of it.

Shape letters: A answers, T tokens of all answers, N supervised rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tunesmith.data.pack import build_batch, pack_sequences
from tunesmith.data.tokenize import TokenSequence
from tunesmith.objectives.policy_losses import Averaging, token_weights
from tunesmith.rollout.experience import Experience
from tunesmith.types import GlobalBatch, PackedBatch


@dataclass(frozen=True)
class Packing:
    """How answers are laid into micro-batches.

    Args:
        averaging: what counts alike in the loss.
        max_new_tokens: of an answer.
        pad_to: rows of a micro-batch are filled up to a multiple of it.
        share_prefixes: compute what answers have in common at their beginnings once.
    """

    averaging: Averaging
    max_new_tokens: int
    pad_to: int = 1
    share_prefixes: bool = True

    def batch(
        self, experience: Experience, answers: Sequence[int], budget: int, *, epoch: int
    ) -> GlobalBatch:
        """The global batch of some answers, in micro-batches of at most `budget` tokens."""
        packed = tuple(self.micro_batches(experience, answers, budget))
        samples = dict.fromkeys(experience.sample_ids[a // experience.num_answers] for a in answers)
        return GlobalBatch(
            epoch=epoch,
            sample_ids=tuple(samples),
            micro_batches=packed,
            supervised_weight=sum(batch.loss_weight for batch in packed),
            num_supervised=sum(int(batch.row_N.numel()) for batch in packed),
            num_tokens=sum(batch.num_tokens for batch in packed),
            facts=experience.facts,
        )

    def micro_batches(
        self, experience: Experience, answers: Sequence[int], budget: int
    ) -> Iterator[PackedBatch]:
        """Packs of some answers, with their columns."""
        sequences = [self._sequence(experience, answer) for answer in answers]
        ids = [sequence.ids for _, sequence in sequences]
        bins = pack_sequences(ids, budget, share_prefixes=self.share_prefixes) if ids else []
        sample_A = torch.tensor(experience.sample_ids).repeat_interleave(experience.num_answers)
        for forest in bins:
            batch = build_batch(sequences, forest, multiple_of=self.pad_to)
            own = list(dict.fromkeys(batch.sample_N.tolist()))  # here samples are answers
            rows = experience.rows(own)
            yield replace(
                batch,
                sample_N=sample_A[batch.sample_N],
                columns_N={name: column[rows] for name, column in experience.columns_T.items()},
                loss_weight=self._divisor(experience, own),
            )

    def _sequence(self, experience: Experience, answer: int) -> tuple[int, TokenSequence]:
        prompt = experience.prompts[answer // experience.num_answers]
        ids = experience.answers[answer]
        weight_T, _ = self._weights(len(ids), 1)
        run = (len(prompt), len(ids), float(weight_T[0]))
        return answer, TokenSequence(np.array([*prompt, *ids], dtype=np.int32), (run,))

    def _divisor(self, experience: Experience, answers: Sequence[int]) -> float:
        num_tokens = sum(len(experience.answers[answer]) for answer in answers)
        return self._weights(num_tokens, len(answers))[1]

    def _weights(self, num_tokens: int, num_answers: int) -> tuple[torch.Tensor, float]:
        return token_weights(
            torch.zeros(num_tokens, dtype=torch.int64),
            num_answers,
            averaging=self.averaging,
            max_tokens=self.max_new_tokens,
        )
