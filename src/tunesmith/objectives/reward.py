"""Reward models on packed pairs: one score at the last token of each conversation.

A pair's prompt is computed once, as in `preference.py`.

Shape letters: T tokens, H hidden size, S sequences of a batch, R rows, C scores of a row, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from tunesmith.objectives.base import StepResult, Trunk
from tunesmith.objectives.lm import decode
from tunesmith.objectives.preference_losses import reward_terms
from tunesmith.types import PackedBatch


@dataclass(frozen=True)
class RewardObjective:
    """The mean over pairs of `-log s(r_w - r_l - margin) + center (r_w + r_l)^2`.

    Args:
        center: weight of the squared sum (arXiv 2312.09244).
        margin: by how much the chosen score is to lead (arXiv 2307.09288 eq. 2).
        trunk: another way through the decoder; None is the model's own.
    """

    center: float = 0.0
    margin: float = 0.0
    trunk: Trunk | None = None
    metric_names: tuple[str, ...] = ("accuracy", "margin", "chosen_score", "rejected_score")
    group_size: int = 2

    def step(self, model: Any, batch: PackedBatch) -> StepResult:
        """`loss_sum` and metrics are sums over the pairs of the batch.

        In eval mode the loss is `-log s(r_w - r_l)` alone. An accuracy counts a pair as 1 if its
        chosen score is the higher one.
        """
        score_S = scores_at(model, batch, batch.last_S, self.trunk)[:, 0]
        chosen_P, rejected_P = score_S[batch.group_GK].unbind(1)
        given: dict[str, Any] = {}
        if model.training:
            given = {"margin_P": chosen_P.new_tensor(self.margin), "center": self.center}
        terms = reward_terms(chosen_P, rejected_P, **given)
        margin_P = terms.chosen_reward_P - terms.rejected_reward_P
        return StepResult(
            loss_sum=terms.loss_P.sum(),
            metrics={
                "accuracy": (margin_P > 0).to(margin_P.dtype).sum(),
                "margin": margin_P.sum(),
                "chosen_score": terms.chosen_reward_P.sum(),
                "rejected_score": terms.rejected_reward_P.sum(),
            },
        )


def scores_at(
    model: Any, batch: PackedBatch, row_R: torch.Tensor, trunk: Trunk | None = None
) -> torch.Tensor:
    """What the model's head says at some rows, `score_RC`, in float32 at least.

    Products are those of float32 also where the model computes in bfloat16, whose eight bits
    would make ties of answers that are nearly as good.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden_TH = decode(base, batch) if trunk is None else trunk.decode(base, batch)
    hidden_RH, weight_CH = hidden_TH.index_select(0, row_R), base.score.weight
    dtype = torch.promote_types(
        torch.promote_types(hidden_RH.dtype, weight_CH.dtype), torch.float32
    )
    with torch.autocast(hidden_RH.device.type, enabled=False):
        return linear(hidden_RH.to(dtype), weight_CH.to(dtype))
