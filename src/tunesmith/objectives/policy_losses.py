"""Advantages and losses of policy gradients (PPO, GRPO, RLOO and kin), as pure functions.

No model and no batch. Tokens of sampled answers lie one after another (`_T`), each with the number
of its answer; only GAE, which walks along answers, takes them padded (`_AL`).

Shape letters: G prompts, K answers of each, A answers (G * K), T tokens of all answers, L tokens of
the longest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

Scale = Literal["group", "batch", "none"]
RatioLevel = Literal["token", "answer"]
Averaging = Literal["answer", "token", "constant"]
Given = TypeVar("Given")

SCALE_EPSILON = 1e-4
"""Added to a standard deviation of rewards before it divides; TRL's value."""


def group_advantages(
    reward_GK: torch.Tensor, *, scale: Scale = "group", epsilon: float = SCALE_EPSILON
) -> torch.Tensor:
    """GRPO, arXiv 2402.03300 §4.1.2: rewards less their group's mean, `advantage_GK`.

    `scale` is what divides them: the group's standard deviation (Bessel's, as in TRL; the paper
    does not say), that of the whole batch (arXiv 2508.08221), or nothing (Dr. GRPO, arXiv
    2503.20783). A reward of NaN is an answer that nobody could score: it counts nowhere, and
    its advantage is 0. A group with equal rewards gets zeros.
    """
    centered_GK = reward_GK - reward_GK.nanmean(dim=1, keepdim=True)
    if scale == "group":
        centered_GK = centered_GK / (_nanstd(reward_GK, dim=1) + epsilon)
    elif scale == "batch":
        centered_GK = centered_GK / (_nanstd(reward_GK.reshape(1, -1), dim=1) + epsilon)
    return centered_GK.nan_to_num(nan=0.0)


def leave_one_out_advantages(
    reward_GK: torch.Tensor, *, is_normalized: bool = False, epsilon: float = SCALE_EPSILON
) -> torch.Tensor:
    """RLOO, arXiv 2402.14740: rewards less the mean of the others of their group.

    `is_normalized` then gives the whole batch mean 0 and deviation 1. NaN as in
    `group_advantages`; an answer without others gets 0.
    """
    count_G1 = (~reward_GK.isnan()).sum(dim=1, keepdim=True)
    others_GK = reward_GK.nansum(dim=1, keepdim=True) - reward_GK
    advantage_GK = reward_GK - others_GK / (count_G1 - 1)
    if is_normalized:
        deviation = _nanstd(advantage_GK.reshape(1, -1), dim=1)
        advantage_GK = (advantage_GK - advantage_GK.nanmean()) / (deviation + epsilon)
    return advantage_GK.nan_to_num(nan=0.0)


def informative_groups(reward_GK: torch.Tensor) -> torch.Tensor:
    """Which groups teach anything, `is_informative_G`: DAPO's dynamic sampling drops the others.

    (arXiv 2503.14476 eq. 11.) A group teaches when two of its scored answers differ.
    """
    high_G = reward_GK.nan_to_num(nan=-torch.inf).amax(dim=1)
    low_G = reward_GK.nan_to_num(nan=torch.inf).amin(dim=1)
    return high_G > low_G


def overlong_penalty(
    tokens_A: torch.Tensor, *, max_tokens: int, buffer_tokens: int
) -> torch.Tensor:
    """DAPO's penalty for length, arXiv 2503.14476 eq. 13: from 0 down to -1 over the buffer."""
    over_A = tokens_A.to(torch.get_default_dtype()) - (max_tokens - buffer_tokens)
    return -(over_A / buffer_tokens).clamp(0, 1)


@dataclass(frozen=True)
class PolicyForm:
    """The numbers of a policy loss.

    Args:
        clip_low: how far below 1 a ratio counts.
        clip_high: how far above 1; more than `clip_low` is DAPO's clip-higher (arXiv 2503.14476).
        ratio_cap: bound on a ratio where the advantage is negative, more than `1 + clip_high`
            (dual clip, arXiv 1912.09729); None is no bound.
        ratio_level: `answer` takes the geometric mean of an answer's ratios for each of its
            tokens (GSPO, arXiv 2507.18071 eq. 7).
        kl_weight: weight of the divergence from the reference.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_cap: float | None = None
    ratio_level: RatioLevel = "token"
    kl_weight: float = 0.0


@dataclass(frozen=True)
class PolicyTerms:
    """What a policy loss gives for each token; all but the loss are detached."""

    loss_T: torch.Tensor
    ratio_T: torch.Tensor
    is_clipped_T: torch.Tensor
    kl_T: torch.Tensor | None = None


def policy_terms(
    logp_T: torch.Tensor,
    old_logp_T: torch.Tensor,
    advantage_T: torch.Tensor,
    *,
    form: PolicyForm,
    ref_logp_T: torch.Tensor | None = None,
    answer_T: torch.Tensor | None = None,
) -> PolicyTerms:
    """The clipped surrogate with its KL term (GRPO, arXiv 2402.03300 eq. 3), for each token.

    Without KL it is PPO's (arXiv 1707.06347 eq. 7), negated. Given whole answers' log-probabilities
    as `_T`, it is RLOO's loss with a ratio for each answer. `old_logp_T` is the policy's that took
    the sample; on policy, `logp_T.detach()`. `answer_T` numbers the answers from 0.
    """
    log_ratio_T = logp_T - old_logp_T
    if form.ratio_level == "answer":
        log_ratio_T = _answer_means(log_ratio_T, _given(answer_T, "answer_T"))
    ratio_T = log_ratio_T.exp()
    loss_T = clipped_surrogate(ratio_T, advantage_T, form)
    kl_T = None
    if form.kl_weight:
        kl_T = reference_kl(logp_T, _given(ref_logp_T, "ref_logp_T"))
        loss_T = loss_T + form.kl_weight * kl_T
    is_low_T = (ratio_T < 1 - form.clip_low) & (advantage_T < 0)
    is_high_T = (ratio_T > 1 + form.clip_high) & (advantage_T > 0)
    return PolicyTerms(
        loss_T=loss_T,
        ratio_T=ratio_T.detach(),
        is_clipped_T=is_low_T | is_high_T,
        kl_T=None if kl_T is None else kl_T.detach(),
    )


def clipped_surrogate(
    ratio_T: torch.Tensor, advantage_T: torch.Tensor, form: PolicyForm
) -> torch.Tensor:
    """`-min(ratio A, clip(ratio) A)`, arXiv 1707.06347 eq. 7, negated to be minimized."""
    clipped_T = ratio_T.clamp(1 - form.clip_low, 1 + form.clip_high)
    if form.ratio_cap is not None:
        ratio_T = ratio_T.clamp(max=form.ratio_cap)
    return -torch.min(ratio_T * advantage_T, clipped_T * advantage_T)


def reference_kl(logp_T: torch.Tensor, ref_logp_T: torch.Tensor) -> torch.Tensor:
    """Unbiased and never negative estimate of KL(policy || reference): `exp(d) - d - 1`.

    (arXiv 2402.03300 eq. 4, "k3".) `expm1` keeps it exact where the two are near: 0 at equality.
    """
    difference_T = ref_logp_T - logp_T
    return difference_T.expm1() - difference_T


def token_weights(
    answer_T: torch.Tensor,
    num_answers: int,
    *,
    averaging: Averaging = "token",
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, float]:
    """What each token's loss counts, `weight_T`, and by what the sum of a batch is divided.

    The divisors of micro-batches add up to that of the global batch. `answer` is GRPO's mean of
    answers' means (arXiv 2402.03300 eq. 3), `token` DAPO's over all tokens (arXiv 2503.14476 eq.
    8), `constant` Dr. GRPO's (arXiv 2503.20783): every answer's sum over `max_tokens`.
    """
    if averaging == "answer":
        tokens_A = torch.bincount(answer_T, minlength=num_answers)
        return tokens_A.to(dtype).reciprocal()[answer_T], float(num_answers)
    weight_T = torch.ones(answer_T.shape, dtype=dtype, device=answer_T.device)
    if averaging == "token":
        return weight_T, float(answer_T.numel())
    return weight_T / _given(max_tokens, "max_tokens"), float(num_answers)


def engine_weights(
    old_logp_T: torch.Tensor, sampled_logp_T: torch.Tensor, *, cap: float = 2.0
) -> torch.Tensor:
    """Truncated importance weights, `min(cap, p_trainer / p_engine)`, detached.

    For samples of an engine whose log-probabilities differ from the trainer's (other kernels,
    another dtype), with the cap of fengyao.notion.site/off-policy-rl. They multiply the loss.
    """
    return (old_logp_T - sampled_logp_T).detach().exp().clamp(max=cap)


def generalized_advantages(
    reward_AL: torch.Tensor,
    value_AL: torch.Tensor,
    is_token_AL: torch.Tensor,
    *,
    discount: float = 1.0,
    decay: float = 0.95,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE, arXiv 1506.02438 eq. 16, and the returns: `advantage_AL`, `return_AL`.

    Rows are padded at their ends, where both are 0. An answer's last token is followed by nothing:
    the value after it is 0. `discount` is the paper's gamma, `decay` its lambda.
    """
    reward_AL, value_AL = reward_AL * is_token_AL, value_AL * is_token_AL
    next_A = torch.zeros_like(reward_AL[:, 0])
    next_value_A = next_A
    advantages: list[torch.Tensor] = []
    for t in reversed(range(reward_AL.shape[1])):
        delta_A = reward_AL[:, t] + discount * next_value_A - value_AL[:, t]
        next_A = delta_A + discount * decay * next_A
        next_value_A = value_AL[:, t]
        advantages.append(next_A)
    advantage_AL = torch.stack(advantages[::-1], dim=1)
    return advantage_AL, (advantage_AL + value_AL) * is_token_AL


def whiten(value_AL: torch.Tensor, is_token_AL: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 over the tokens, 0 elsewhere: PPO's advantages before use."""
    values = value_AL[is_token_AL]
    # 1e-8 is TRL's, inside the root.
    scaled_AL = (value_AL - values.mean()) * (
        values.var(correction=min(1, values.numel() - 1)) + 1e-8
    ).rsqrt()
    return scaled_AL * is_token_AL


def token_rewards(
    score_A: torch.Tensor,
    logp_AL: torch.Tensor,
    ref_logp_AL: torch.Tensor,
    is_token_AL: torch.Tensor,
    *,
    kl_weight: float,
) -> torch.Tensor:
    """PPO's rewards: a penalty of `logp - ref` at each token, and the score at the last.

    (arXiv 2203.02155 §3.5; 1909.08593 eq. 2.) Detached.
    """
    reward_AL = (-kl_weight * (logp_AL - ref_logp_AL)).detach() * is_token_AL
    last_A1 = is_token_AL.sum(dim=1, keepdim=True).clamp(min=1) - 1
    return reward_AL.scatter_add(1, last_A1, score_A.detach()[:, None].to(reward_AL.dtype))


def value_losses(
    value_T: torch.Tensor, old_value_T: torch.Tensor, return_T: torch.Tensor, *, clip: float = 0.2
) -> torch.Tensor:
    """PPO's clipped value loss: half the larger squared error of the value and of its clipped self.

    The clip around the old value is that of PPO's published code, not of arXiv 1707.06347, whose
    eq. 9 has the plain squared error: `clip=inf`.
    """
    clipped_T = old_value_T + (value_T - old_value_T).clamp(-clip, clip)
    return 0.5 * torch.max((value_T - return_T).square(), (clipped_T - return_T).square())


def next_kl_weight(
    kl_weight: float, kl: float, *, target: float, horizon: int, num_answers: int
) -> float:
    """Adaptive KL control, arXiv 1909.08593 §2.2: the weight after `num_answers` at `kl`."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_weight * (1 + error * num_answers / horizon)


def _answer_means(value_T: torch.Tensor, answer_T: torch.Tensor) -> torch.Tensor:
    """Each answer's mean, at each of its tokens."""
    tokens_A = torch.bincount(answer_T)
    sum_A = value_T.new_zeros(tokens_A.shape).index_add(0, answer_T, value_T)
    return (sum_A / tokens_A.clamp(min=1))[answer_T]


def _nanstd(value_GK: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Standard deviation, with Bessel's correction, of what is not NaN; 0 of a single value."""
    count_G1 = (~value_GK.isnan()).sum(dim=dim, keepdim=True)
    off_GK = value_GK - value_GK.nanmean(dim=dim, keepdim=True)
    return (off_GK.square().nansum(dim=dim, keepdim=True) / (count_G1 - 1).clamp(min=1)).sqrt()


def _given(value: Given | None, name: str) -> Given:
    if value is None:
        raise TypeError(f"this form of the loss needs {name}")
    return value
