"""Language-model objectives on packed batches.

Shape letters: T tokens, H hidden size, N supervised rows, S sequences of a batch, R rows of a
chunk, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from tunesmith.objectives.base import StepResult, Trunk
from tunesmith.ops.linear_logp import CHUNK_BYTES, linear_cross_entropy, linear_logp, row_losses
from tunesmith.types import PackedBatch


@dataclass(frozen=True)
class SftObjective:
    """Cross-entropy of the supervised tokens, each times its weight.

    Args:
        label_smoothing: share of each target's probability spread over the vocabulary.
        z_loss: weight of the squared log-normalizer (arXiv 2204.02311 §5).
        variant: dft multiplies each token's loss by its own probability, taken as a constant
            (arXiv 2508.05629 eq. 9); without the two above.
        trunk: another way through the decoder; None is the model's own.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    variant: Literal["plain", "dft"] = "plain"
    trunk: Trunk | None = None
    metric_names: tuple[str, ...] = ()
    group_size: int = 0

    def step(self, model: Any, batch: PackedBatch) -> StepResult:
        """`loss_sum = sum(weight * loss)`; a batch without supervised rows gives 0.

        In eval mode the loss is the plain cross-entropy, without smoothing, z-loss and dft.
        """
        if self.variant == "dft" and model.training:
            logp_N = supervised_logp(model, batch, self.trunk)
            weight_N = batch.weight_N.to(logp_N.dtype) * logp_N.detach().exp()
            return StepResult(loss_sum=-(weight_N * logp_N).sum(), loss_N=-logp_N.detach())
        extra: dict[str, Any] = {}
        if model.training:
            extra = {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
        base, hidden_NH = supervised_hidden(model, batch, self.trunk)
        head, form = base.get_output_embeddings(), head_form(base.config)
        if is_matrix(head):
            loss_sum, loss_N = linear_cross_entropy(
                hidden_NH, head.weight, batch.target_N, batch.weight_N,
                bias_V=head.bias, **form, **extra,
            )  # fmt: skip
        else:
            loss_N = head_losses(head, hidden_NH, batch.target_N, **form, **extra)
            loss_sum = (batch.weight_N.to(loss_N.dtype) * loss_N).sum()
        return StepResult(loss_sum=loss_sum, loss_N=loss_N.detach())


def supervised_logp(model: Any, batch: PackedBatch, trunk: Trunk | None = None) -> torch.Tensor:
    """Log-probability of every supervised token, `logp_N`; only their rows reach the head."""
    base, hidden_NH = supervised_hidden(model, batch, trunk)
    head, form = base.get_output_embeddings(), head_form(base.config)
    if is_matrix(head):
        return linear_logp(hidden_NH, head.weight, batch.target_N, bias_V=head.bias, **form)
    return -head_losses(head, hidden_NH, batch.target_N, **form)


def sequence_logp(model: Any, batch: PackedBatch, trunk: Trunk | None = None) -> torch.Tensor:
    """Summed log-probability of each sequence's supervised tokens, `logp_S`."""
    logp_N = supervised_logp(model, batch, trunk)
    return logp_N.new_zeros(batch.last_S.numel()).index_add(0, batch.sequence_N, logp_N)


def supervised_hidden(
    model: Any, batch: PackedBatch, trunk: Trunk | None = None
) -> tuple[Any, torch.Tensor]:
    """The model without its adapters' wrapper, and the hidden states that predict, `hidden_NH`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden_TH = decode(base, batch) if trunk is None else trunk.decode(base, batch)
    return base, hidden_TH.index_select(0, batch.row_N)


def decode(base: Any, batch: PackedBatch) -> torch.Tensor:
    """The decoder's last hidden states, `hidden_TH`; segments do not see each other."""
    out = base.get_decoder()(
        input_ids=batch.ids_T[None],
        position_ids=batch.position_T[None],
        use_cache=False,
        segments=batch.segments,
    )
    return out.last_hidden_state[0]


def is_matrix(head: Any) -> bool:
    """Whether the head is a plain matrix, not an adapted or a quantized one."""
    return isinstance(head, torch.nn.Linear) and head.weight.shape == (
        head.out_features,
        head.in_features,
    )


def head_losses(
    head: Any, hidden_NH: torch.Tensor, target_N: torch.Tensor, **form: Any
) -> torch.Tensor:
    """Loss of each row under any head, a chunk at a time; the backward makes the logits again."""

    def losses(hidden_RH: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
        return row_losses(head(hidden_RH), target_R, **form)

    rows = max(1, CHUNK_BYTES // (4 * head.out_features))
    parts = list(zip(hidden_NH.split(rows), target_N.split(rows), strict=True))
    if len(parts) == 1 or not torch.is_grad_enabled():
        return torch.cat([losses(*part) for part in parts])
    pieces: list[Any] = [checkpoint(losses, *part, use_reentrant=False) for part in parts]
    return torch.cat(pieces)


def head_form(config: Any) -> dict[str, Any]:
    """Factor on the logits and soft cap, under the names that model families use for them."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    return {"scale": scale, "softcap": getattr(config, "final_logit_softcapping", None)}  # Gemma 2
