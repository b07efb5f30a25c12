"""Language-model objectives on packed batches.

Shape letters: T tokens, H hidden size, N supervised rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.objectives.base import StepResult
from tunesmith.ops.linear_logp import linear_logp
from tunesmith.types import PackedBatch


class SftObjective:
    """Cross-entropy of the supervised tokens, each times its weight."""

    def step(self, model: Any, batch: PackedBatch) -> StepResult:
        """`loss_sum = -sum(weight * log p(target))`; a batch without supervised rows gives 0."""
        logp_N = supervised_logp(model, batch)
        weight_N = batch.weight_N.to(logp_N.dtype)
        return StepResult(loss_sum=-(weight_N * logp_N).sum())


def supervised_logp(model: Any, batch: PackedBatch) -> torch.Tensor:
    """Log-probability of every supervised token, `logp_N`; only their rows reach the head."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden_TH = decode(base, batch)
    hidden_NH = hidden_TH.index_select(0, batch.row_N)
    head: Any = base.get_output_embeddings()
    scale, softcap = head_scale(base.config)
    if isinstance(head, torch.nn.Linear) and getattr(head, "bias", None) is None:
        return linear_logp(hidden_NH, head.weight, batch.target_N, scale=scale, softcap=softcap)
    # An adapted or biased head goes the plain way.
    logits_NV = head(hidden_NH).float() * scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return logits_NV.log_softmax(-1).gather(1, batch.target_N[:, None])[:, 0]


def decode(base: Any, batch: PackedBatch) -> torch.Tensor:
    """The decoder's last hidden states, `hidden_TH`; segments do not see each other."""
    out = base.get_decoder()(
        input_ids=batch.ids_T[None],
        position_ids=batch.position_T[None],
        use_cache=False,
        segments=batch.segments,
    )
    return out.last_hidden_state[0]


def head_scale(config: Any) -> tuple[float, float | None]:
    """(factor on the logits, soft cap) under the names that model families use for them."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    return scale, getattr(config, "final_logit_softcapping", None)  # Gemma 2
