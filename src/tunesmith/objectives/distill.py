"""Distillation: the student learns the teacher's distribution of every supervised token.

Shape letters: N supervised rows, H hidden size, R rows of a chunk, V vocabulary, C the part of it
that both heads have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from tunesmith.objectives.base import StepResult, Trunk
from tunesmith.objectives.lm import head_form, is_matrix, supervised_hidden
from tunesmith.objectives.preference_losses import kl_rows
from tunesmith.ops.linear_divergence import (
    CHUNK_BYTES,
    Blend,
    DivergenceKind,
    Found,
    linear_divergence,
)
from tunesmith.ops.linear_logp import row_losses
from tunesmith.types import PackedBatch


@dataclass(frozen=True)
class DistillObjective:
    """Divergence from a teacher on the supervised tokens, each times its weight.

    Args:
        teacher: a frozen model in eval mode that takes packed batches, of the same tokenizer.
        divergence: forward, reverse or jsd (arXiv 2306.13649 §2).
        beta: the teacher's share of the mixture of jsd.
        temperature: divides the logits of both, for the divergence.
        sft_weight: share of the plain cross-entropy in the loss.
        trunk: the student's other way through the decoder.
    """

    teacher: Any = field(repr=False)
    divergence: DivergenceKind = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    sft_weight: float = 0.0
    trunk: Trunk | None = None
    metric_names: tuple[str, ...] = ("kl", "agreement")
    group_size: int = 0

    def step(self, model: Any, batch: PackedBatch) -> StepResult:
        """Sums over supervised weight; `kl` is KL(teacher || student) for every divergence.

        `agreement` counts the tokens that both models find likeliest. The loss is the same in eval
        mode. Where one head has more rows than the other, padding mostly, they are left out.
        """
        # First, while nothing of the student's own pass is kept.
        with torch.no_grad():
            teacher, teacher_NH = supervised_hidden(self.teacher, batch)
        base, hidden_NH = supervised_hidden(model, batch, self.trunk)
        heads = base.get_output_embeddings(), teacher.get_output_embeddings()
        size = min(head.out_features for head in heads)
        target = _Target(teacher, teacher_NH, size)
        blend = Blend(self.divergence, self.beta, self.temperature, self.sft_weight)
        if is_matrix(heads[0]):
            found = linear_divergence(
                hidden_NH, heads[0].weight, batch.target_N, batch.weight_N, target.logits,
                blend=blend, size=size, bias_V=heads[0].bias, **head_form(base.config),
            )  # fmt: skip
        else:
            found = _by_parts(base, hidden_NH, batch, target, blend)
        metrics = {"kl": found.kl_sum, "agreement": found.agreement_sum}
        return StepResult(loss_sum=found.loss_sum, metrics=metrics)


@dataclass(frozen=True)
class _Target:
    """What the teacher says about the rows of a batch, made when it is asked for."""

    teacher: Any
    hidden_NH: torch.Tensor
    size: int

    @torch.no_grad()
    def logits(self, rows: slice) -> torch.Tensor:
        """The model's own logits of some rows, `logits_RC`."""
        return _logits(self.teacher, self.hidden_NH[rows], self.size)


def _logits(base: Any, hidden_RH: torch.Tensor, size: int) -> torch.Tensor:
    """Logits under any head, scaled and capped, of the first `size` tokens; fp32 or wider."""
    form = head_form(base.config)
    logits_RC = base.get_output_embeddings()(hidden_RH)[:, :size]
    logits_RC = logits_RC.to(torch.promote_types(logits_RC.dtype, torch.float32))
    if form["scale"] != 1.0:
        logits_RC = logits_RC * form["scale"]
    if form["softcap"] is not None:
        logits_RC = form["softcap"] * torch.tanh(logits_RC / form["softcap"])
    return logits_RC


def _by_parts(
    base: Any, hidden_NH: torch.Tensor, batch: PackedBatch, target: _Target, blend: Blend
) -> Found:
    """The same for a head that is more than a matrix; the backward makes the logits again."""

    def sums(part: slice, hidden_RH: torch.Tensor) -> torch.Tensor:
        logits_RC, teacher_RC = _logits(base, hidden_RH, target.size), target.logits(part)
        kl_R = kl_rows(logits_RC, teacher_RC, temperature=blend.temperature)
        loss_R = kl_R
        if blend.kind != "forward":
            loss_R = kl_rows(
                logits_RC, teacher_RC, blend.kind,
                temperature=blend.temperature, teacher_share=blend.teacher_share,
            )  # fmt: skip
        plain_R = row_losses(logits_RC, batch.target_N[part])
        loss_R = (1 - blend.sft_weight) * loss_R + blend.sft_weight * plain_R
        agreement_R = (logits_RC.argmax(-1) == teacher_RC.argmax(-1)).to(loss_R.dtype)
        found_3R = torch.stack((loss_R, kl_R.detach(), agreement_R))
        return (found_3R * batch.weight_N[part].to(found_3R.dtype)).sum(-1)

    rows = max(1, CHUNK_BYTES // (4 * target.size))
    starts = range(0, max(1, len(hidden_NH)), rows)
    parts = [slice(start, start + rows) for start in starts]
    if torch.is_grad_enabled():
        pieces: list[Any] = [
            checkpoint(sums, part, hidden_NH[part], use_reentrant=False) for part in parts
        ]
    else:
        pieces = [sums(part, hidden_NH[part]) for part in parts]
    loss, kl, agreement = torch.stack(pieces).sum(0).unbind()
    return Found(loss, kl.detach(), agreement.detach())
