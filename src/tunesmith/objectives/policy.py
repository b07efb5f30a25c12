"""Objectives on answers that the model sampled itself: GRPO and its relatives, and PPO.

What is known of each token when answers are sampled stands in the batch's columns: `advantage`,
and, where several updates learn from the same answers, `old_logp` and `ref_logp`; `engine_logp` is
what the sampling engine found; `value` and `return` are PPO's. The weights of tokens in a batch,
and what their sum is divided by, are those of `token_weights`.

Shape letters: N supervised rows (the answers' tokens), S sequences (answers), H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tunesmith.objectives.base import StepResult, Trunk
from tunesmith.objectives.lm import head_form, head_losses, is_matrix, supervised_hidden
from tunesmith.objectives.policy_losses import (
    PolicyForm,
    engine_weights,
    policy_terms,
    reference_kl,
    value_losses,
)
from tunesmith.objectives.preference import Reference
from tunesmith.ops.linear_logp import linear_logp
from tunesmith.types import PackedBatch

Columns = Mapping[str, torch.Tensor]


class ValueHead(torch.nn.Module):
    """What reward is still to be expected behind each token: PPO's critic on the shared decoder.

    It begins as nothing: all values 0. Its numbers are float32.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size))
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """`value_N`."""
        with torch.autocast(hidden_NH.device.type, enabled=False):
            return torch.nn.functional.linear(hidden_NH.float(), self.weight, self.bias)[:, 0]


@dataclass(frozen=True)
class ValueForm:
    """How a value head learns: its loss's weight, and how far a value may move."""

    weight: float = 0.1
    clip: float = 0.2


@dataclass(frozen=True)
class PolicyObjective:
    """The clipped surrogate on sampled tokens, with its divergence from the reference.

    Args:
        form: the numbers of the loss; its KL weight is 0 where the divergence is in the reward.
        temperature: at which answers were sampled.
        is_of_answers: one ratio for each answer, of its summed log-probability (RLOO).
        engine_cap: bound on `engine_weights`; None does not weigh.
        trunk: another way through the decoder.
        reference: of the policy; None where nothing asks for it.
        value_head: PPO's critic.
        value_form: how it learns.
    """

    form: PolicyForm = field(default_factory=PolicyForm)
    temperature: float = 1.0
    is_of_answers: bool = False
    engine_cap: float | None = None
    trunk: Trunk | None = None
    reference: Reference | None = None
    value_head: ValueHead | None = None
    value_form: ValueForm = field(default_factory=ValueForm)
    group_size: int = 0

    @property
    def metric_names(self) -> tuple[str, ...]:
        """`ratio` and `clip_fraction` say how far the policy has moved since the sampling."""
        names = ("ratio", "clip_fraction", "engine_ratio")
        names += ("kl",) if self.form.kl_weight else ()
        return (*names, "value_loss") if self.value_head is not None else names

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """What is trained besides the model."""
        if self.value_head is not None:
            for name, parameter in self.value_head.named_parameters():
                yield f"value_head.{name}", parameter

    def step(self, model: Any, batch: PackedBatch) -> StepResult:
        """`loss_sum` and metrics are sums over tokens by their weights."""
        columns = batch.columns_N
        ref_N = columns.get("ref_logp")
        if ref_N is None and self.form.kl_weight:
            ref_N = self._reference_logp(model, batch)
        base, hidden_NH = supervised_hidden(model, batch, self.trunk)
        logp_N = self._logp(base, hidden_NH, batch)
        old_N = columns.get("old_logp", logp_N.detach())
        weight_N = batch.weight_N.to(logp_N.dtype)
        if self.is_of_answers:
            loss_N, ratio_N, is_clipped_N = self._of_answers(logp_N, old_N, batch)
        else:
            terms = policy_terms(
                logp_N, old_N, columns["advantage"], form=self.form, ref_logp_T=ref_N,
                answer_T=batch.sequence_N,
            )  # fmt: skip
            loss_N, ratio_N, is_clipped_N = terms.loss_T, terms.ratio_T, terms.is_clipped_T
        engine_N = engine_weights(old_N, columns["engine_logp"], cap=torch.inf)
        if self.engine_cap is not None:
            weight_N = weight_N * engine_N.clamp(max=self.engine_cap)
        given_N = batch.weight_N.to(logp_N.dtype)
        loss_sum = (weight_N * loss_N).sum()
        found = {"ratio": ratio_N, "clip_fraction": is_clipped_N, "engine_ratio": engine_N}
        if self.form.kl_weight and ref_N is not None:
            found["kl"] = reference_kl(logp_N.detach(), ref_N)
        if self.value_head is not None:
            value_N = self.value_head(hidden_NH)
            found["value_loss"] = value_losses(
                value_N, columns["value"], columns["return"], clip=self.value_form.clip
            )
            loss_sum = loss_sum + self.value_form.weight * (given_N * found["value_loss"]).sum()
        sums = {name: (given_N * found[name].detach()).sum() for name in self.metric_names}
        return StepResult(loss_sum=loss_sum, metrics=sums)

    @torch.no_grad()
    def look(self, model: Any, batch: PackedBatch, *, with_reference: bool) -> Columns:
        """What is known of each token before any update: `old_logp`, `ref_logp`, `value`."""
        found: dict[str, torch.Tensor] = {}
        if with_reference:
            found["ref_logp"] = self._reference_logp(model, batch)
        base, hidden_NH = supervised_hidden(model, batch, self.trunk)
        found["old_logp"] = self._logp(base, hidden_NH, batch)
        if self.value_head is not None:
            found["value"] = self.value_head(hidden_NH)
        return found

    def _of_answers(
        self, logp_N: torch.Tensor, old_N: torch.Tensor, batch: PackedBatch
    ) -> tuple[torch.Tensor, ...]:
        """Each answer's terms, at each of its tokens."""
        count, sequence_N = batch.last_S.numel(), batch.sequence_N
        logp_S, old_S = (x.new_zeros(count).index_add(0, sequence_N, x) for x in (logp_N, old_N))
        # All tokens of an answer have its advantage.
        advantage_N = batch.columns_N["advantage"]
        advantage_S = advantage_N.new_zeros(count).scatter(0, sequence_N, advantage_N)
        terms = policy_terms(logp_S, old_S, advantage_S, form=self.form)
        each = (terms.loss_T, terms.ratio_T, terms.is_clipped_T)
        return tuple(x_S[sequence_N] for x_S in each)

    def _reference_logp(self, model: Any, batch: PackedBatch) -> torch.Tensor:
        if self.reference is None:
            raise TypeError("a divergence needs a reference")
        with torch.no_grad(), self.reference():
            base, hidden_NH = supervised_hidden(model, batch, self.trunk)
            return self._logp(base, hidden_NH, batch)

    def _logp(self, base: Any, hidden_NH: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        head, form = base.get_output_embeddings(), head_form(base.config)
        form["scale"] /= self.temperature
        if is_matrix(head):
            return linear_logp(hidden_NH, head.weight, batch.target_N, bias_V=head.bias, **form)
        return -head_losses(head, hidden_NH, batch.target_N, **form)


def make_policy(
    name: str,
    *,
    trunk: Trunk | None = None,
    reference: Reference | None = None,
    value_head: ValueHead | None = None,
    **settings: Any,
) -> PolicyObjective:
    """The objective of a name of the registry.

    Args:
        name: of the registry.
        trunk: another way through the decoder.
        reference: of the policy.
        value_head: PPO's critic.
        settings: of the recipe; those that say how answers are sampled and judged are not its own.
    """
    has_kl_in_reward = name in ("rloo", "ppo")
    form = PolicyForm(
        clip_low=settings["clip"],
        clip_high=settings["clip_high"],
        ratio_cap=settings["ratio_cap"],
        ratio_level="answer" if name == "gspo" else "token",
        kl_weight=0.0 if has_kl_in_reward else settings["kl_weight"],
    )
    value_form = ValueForm()
    if name == "ppo":
        value_form = ValueForm(settings["value_weight"], settings["value_clip"])
    return PolicyObjective(
        form=form,
        temperature=settings["temperature"],
        is_of_answers=name == "rloo",
        engine_cap=settings["engine_weight_cap"],
        trunk=trunk,
        reference=reference,
        value_head=value_head,
        value_form=value_form,
    )
