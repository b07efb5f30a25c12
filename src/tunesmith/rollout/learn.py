"""From rewards to advantages: what each token of the answers is to be learned by.

Shape letters: P prompts, K answers of each, A answers, T tokens of all answers, L tokens of the
longest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from tunesmith.config.policy import GroupConfig, PpoConfig
from tunesmith.objectives.policy_losses import (
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    next_kl_weight,
    token_rewards,
    whiten,
)
from tunesmith.rollout.experience import Experience


@dataclass(frozen=True)
class Lesson:
    """What is added to an experience.

    Args:
        columns_T: `advantage`, and PPO's `return`.
        kl: the mean divergence of an answer from the reference; None where nobody asks.
    """

    columns_T: dict[str, torch.Tensor]
    kl: float | None = None


def lesson_of(experience: Experience, config: GroupConfig | PpoConfig) -> Lesson:
    """What is to be learned from answers whose rewards and log-probabilities are known."""
    if isinstance(config, PpoConfig):
        return _ppo_lesson(experience, config)
    kl, reward_PK = None, experience.reward_PK
    if config.name == "rloo":
        if experience.kl_weight:
            kl_A = _summed(experience, _log_ratios(experience))
            reward_PK = reward_PK - experience.kl_weight * kl_A.view_as(reward_PK)
            kl = float(kl_A.mean())
        advantage_PK = leave_one_out_advantages(reward_PK)
    else:
        if config.scale == "auto":
            raise ValueError("an unresolved value: objective.scale")
        advantage_PK = group_advantages(reward_PK, scale=config.scale)
    advantage_T = advantage_PK.flatten()[experience.answer_T].float()
    return Lesson({"advantage": advantage_T}, kl)


def _ppo_lesson(experience: Experience, config: PpoConfig) -> Lesson:
    columns = experience.columns_T
    old_AL = _padded(experience, columns["old_logp"])
    is_token_AL = _padded(experience, torch.ones(len(columns["old_logp"]))).bool()
    has_reference = "ref_logp" in columns
    ref_AL = _padded(experience, columns["ref_logp"]) if has_reference else old_AL
    # What nobody could judge is worth what is usual here: no news in either direction.
    known_A = experience.reward_A.nan_to_num(nan=float(experience.reward_A.nanmean().nan_to_num()))
    reward_AL = token_rewards(
        known_A.float(), old_AL, ref_AL, is_token_AL, kl_weight=experience.kl_weight
    )
    advantage_AL, return_AL = generalized_advantages(
        reward_AL,
        _padded(experience, columns["value"]),
        is_token_AL,
        discount=config.discount,
        decay=config.decay,
    )
    advantage_AL = whiten(advantage_AL, is_token_AL)
    learned = {"advantage": advantage_AL[is_token_AL], "return": return_AL[is_token_AL]}
    kl_A = _summed(experience, _log_ratios(experience)) if has_reference else None
    return Lesson(learned, None if kl_A is None else float(kl_A.mean()))


def following_kl_weight(experience: Experience, config: GroupConfig | PpoConfig) -> float:
    """The KL weight of the next sampling."""
    kl = experience.facts.get("kl_of_answers")
    if not isinstance(config, PpoConfig) or config.kl_target is None or not isinstance(kl, float):
        return experience.kl_weight
    return next_kl_weight(
        experience.kl_weight,
        kl,
        target=config.kl_target,
        horizon=config.kl_horizon,
        num_answers=len(experience.answers),
    )


def _log_ratios(experience: Experience) -> torch.Tensor:
    return experience.columns_T["old_logp"] - experience.columns_T["ref_logp"]


def _summed(experience: Experience, value_T: torch.Tensor) -> torch.Tensor:
    zeros_A = value_T.new_zeros(len(experience.answers))
    return zeros_A.index_add(0, experience.answer_T, value_T)


def _padded(experience: Experience, value_T: torch.Tensor) -> torch.Tensor:
    """A column by answers, 0 behind their ends: `value_AL`."""
    lengths = [len(ids) for ids in experience.answers]
    return pad_sequence(list(value_T.split(lengths)), batch_first=True)
