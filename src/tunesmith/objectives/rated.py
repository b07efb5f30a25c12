"""Objectives on answers that were rated good or bad, one by one: KTO and its relative.

Shape letters: N supervised rows, S sequences of a batch, G samples, K sequences of each, A rated
answers (one a sample), M mismatched answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tunesmith.objectives.base import StepResult, Trunk
from tunesmith.objectives.lm import sequence_logp
from tunesmith.objectives.preference import Reference, reference_logp
from tunesmith.objectives.preference_losses import RatedKind, kto_kl, kto_terms
from tunesmith.types import PackedBatch


@dataclass(frozen=True)
class RatedObjective:
    """The mean over rated answers of a loss of `kto_terms`.

    `kto` measures rewards from a reference point, an estimate of the KL between policy and
    reference (arXiv 2402.01306 §4.1) from mismatched answers: its batches hold two sequences a
    sample, the rated one and another sample's answer behind the same prompt (`group_GK`, K 2).
    The point is one for all samples of a step. Where a step has several micro-batches, it must be
    known before the first backward: `look_ahead` on each of them, then `prepared`. Without that,
    each micro-batch takes a point of its own, and loss and gradients depend on the split: close,
    but not the same. Validation does so: looking ahead would double its cost, and evaluations of a
    run, which have the same packs, can be compared all the same.

    `apo_zero_unpaired` has no such point and is the same for any split.

    Args:
        kind: the loss.
        beta: strength of the tie to the reference.
        desirable_weight: of good answers.
        undesirable_weight: of bad ones.
        trunk: another way through the decoder.
        reference: of the policy; None takes one that gives every answer the same probability,
            which drops out of reward minus reference point, and with it the bound at 0.
        point: the reference point of the step; None estimates it from the batch at hand.
    """

    kind: RatedKind
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    trunk: Trunk | None = None
    reference: Reference | None = None
    point: torch.Tensor | None = None
    group_size: int = 1

    @property
    def metric_names(self) -> tuple[str, ...]:
        """`kl` is that of KTO alone."""
        return ("reward_accuracy", "reward_gap", *(("kl",) if self.kind == "kto" else ()))

    def step(self, model: Any, batch: PackedBatch) -> StepResult:
        """`loss_sum` and metrics are sums over the rated answers of the batch.

        Every metric is to be divided by the number of all rated answers, so none is a mean over
        the good or the bad ones alone. `reward_accuracy` counts an answer as 1 if its reward is
        above 0 and it is good, or below 0 and it is bad. `reward_gap` sums the rewards of good
        answers less those of bad ones; with as many good as bad ones its mean is half of what is
        called reward margin. Without a reference both measure rewards from the reference point.
        `kl` is this point, once for each answer.
        """
        # First, while nothing of the policy's own pass is kept.
        ref_S = self._reference_logp(model, batch)
        logp_S = self._logp(model, batch)
        answer_A = batch.group_GK[:, 0]
        point = self._point(logp_S - ref_S, batch)
        terms = kto_terms(
            logp_S[answer_A],
            ref_S[answer_A],
            batch.label_G,
            kl=point,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            kind=self.kind,
        )
        sign_A = (2 * batch.label_G - 1).to(terms.reward_A.dtype)
        # Without a reference, rewards have no zero of their own.
        agreement_A = sign_A * (terms.reward_A - (self.beta * point if not self.reference else 0))
        metrics = {
            "reward_accuracy": (agreement_A > 0).to(agreement_A.dtype).sum(),
            "reward_gap": agreement_A.sum(),
            "kl": point * len(answer_A),
        }
        return StepResult(
            loss_sum=terms.loss_A.sum(), metrics={name: metrics[name] for name in self.metric_names}
        )

    @property
    def looks_ahead(self) -> bool:
        """Whether a step of several micro-batches needs `look_ahead` to be exact."""
        return self.kind == "kto" and self.point is None

    @torch.no_grad()
    def look_ahead(self, model: Any, batch: PackedBatch) -> torch.Tensor:
        """Log-ratios of a micro-batch's mismatched answers, `ratio_M`; costs two forwards."""
        ratio_S = self._logp(model, batch) - self._reference_logp(model, batch)
        return ratio_S[batch.group_GK[:, 1]]

    def prepared(self, found: Sequence[torch.Tensor]) -> RatedObjective:
        """The objective of one step, from what `look_ahead` found in all its micro-batches."""
        return replace(self, point=self._point_of(torch.cat(list(found))))

    def _point(self, ratio_S: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        if self.kind != "kto":
            return ratio_S.new_zeros(())
        if self.point is not None:
            return self.point
        return self._point_of(ratio_S[batch.group_GK[:, 1]])

    def _point_of(self, ratio_M: torch.Tensor) -> torch.Tensor:
        # A log-probability less an unknown constant has no zero to be bounded at.
        if self.reference is None:
            return ratio_M.detach().mean()
        return kto_kl(ratio_M, torch.zeros_like(ratio_M))

    def _reference_logp(self, model: Any, batch: PackedBatch) -> torch.Tensor:
        """`ref_S`, 0 without a reference."""
        ref_S = reference_logp(model, batch, self.reference, self.trunk)
        if ref_S is None:
            return torch.zeros(batch.last_S.numel(), device=batch.ids_T.device)
        return ref_S

    def _logp(self, model: Any, batch: PackedBatch) -> torch.Tensor:
        """Summed log-probability of each sequence's answer, `logp_S`."""
        return sequence_logp(model, batch, self.trunk)
