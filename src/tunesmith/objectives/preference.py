"""Preference objectives on packed batches: DPO and its relatives.

A pair's prompt is computed once: both answers stand behind the same copy of it in one pack, with
gradients as if each had its own.

Shape letters: N supervised rows, S sequences of a batch, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.objectives.base import StepResult, Trunk
from tunesmith.objectives.lm import sequence_logp
from tunesmith.objectives.preference_losses import PAIR_KINDS, pair_terms
from tunesmith.types import PackedBatch

Reference = Callable[[], AbstractContextManager[object]]
"""Inside of it the model is what it was before training."""


@dataclass(frozen=True)
class PreferenceObjective:
    """The mean over pairs of a loss named in PAIR_KINDS.

    Args:
        kind: the loss.
        beta: strength of the tie to the reference.
        label_smoothing: how often a label is taken to be flipped.
        margin: SimPO's gamma.
        sft_weight: of the chosen answer's own loss; None is what the kind's paper adds.
        trunk: another way through the decoder.
        reference: of the policy; None for losses that look at none, and where batches bring its
            numbers (`reference_S`).
    """

    kind: str
    beta: float = 0.1
    label_smoothing: float = 0.0
    margin: float = 0.0
    sft_weight: float | None = None
    trunk: Trunk | None = None
    reference: Reference | None = None
    metric_names: tuple[str, ...] = (
        "reward_accuracy",
        "reward_margin",
        "chosen_reward",
        "rejected_reward",
    )
    group_size: int = 2

    def step(self, model: Any, batch: PackedBatch) -> StepResult:
        """`loss_sum` and metrics are sums over the pairs of the batch.

        An accuracy counts a pair as 1 if its chosen reward is the higher one.
        """
        chosen_P, rejected_P = batch.group_GK.unbind(1)
        given: dict[str, torch.Tensor] = {}
        # First, while nothing of the policy's own pass is kept.
        ref_S = reference_logp(model, batch, self.reference, self.trunk)
        logp_S = sequence_logp(model, batch, self.trunk)
        if ref_S is not None:
            given = {"chosen_ref_P": ref_S[chosen_P], "rejected_ref_P": ref_S[rejected_P]}
        tokens_S = torch.zeros_like(logp_S).index_add(
            0, batch.sequence_N, torch.ones_like(batch.sequence_N, dtype=logp_S.dtype)
        )
        terms = pair_terms(
            self.kind,
            logp_S[chosen_P],
            logp_S[rejected_P],
            **given,
            chosen_tokens_P=tokens_S[chosen_P],
            rejected_tokens_P=tokens_S[rejected_P],
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            margin=self.margin,
            sft_weight=self.sft_weight,
        )
        margin_P = terms.chosen_reward_P - terms.rejected_reward_P
        return StepResult(
            loss_sum=terms.loss_P.sum(),
            metrics={
                "reward_accuracy": (margin_P > 0).to(margin_P.dtype).sum(),
                "reward_margin": margin_P.sum(),
                "chosen_reward": terms.chosen_reward_P.sum(),
                "rejected_reward": terms.rejected_reward_P.sum(),
            },
        )


def reference_logp(
    model: Any, batch: PackedBatch, reference: Reference | None, trunk: Trunk | None
) -> torch.Tensor | None:
    """The reference's summed log-probability of each sequence, `ref_S`; None if there is none.

    Numbers that a batch brings are taken, and save the forward.
    """
    if batch.reference_S is not None:
        return batch.reference_S
    if reference is None:
        return None
    with torch.no_grad(), reference():
        return sequence_logp(model, batch, trunk)


def needs_reference(kind: str) -> bool:
    """Whether a loss looks at the reference."""
    return PAIR_KINDS[kind].needs_reference
