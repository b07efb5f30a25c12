"""What judges sampled answers, by the names that recipes use."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tunesmith.objectives.rewards.base import Answered, RewardFunction, total_rewards
from tunesmith.objectives.rewards.lengths import LengthReward, RepetitionReward
from tunesmith.objectives.rewards.mathematics import MathReward
from tunesmith.objectives.rewards.plugins import PythonReward
from tunesmith.objectives.rewards.remote import HttpReward
from tunesmith.objectives.rewards.structured import JsonSchemaReward
from tunesmith.objectives.rewards.texts import FormatReward, MatchReward, RegexReward

REWARDS: dict[str, Callable[..., RewardFunction]] = {
    "match": MatchReward,
    "regex": RegexReward,
    "json_schema": JsonSchemaReward,
    "math": MathReward,
    "format": FormatReward,
    "length": LengthReward,
    "repetition": RepetitionReward,
    "http": HttpReward,
    "python": PythonReward,
}
"""Those that need no more than the answers; a reward model needs a model as well."""


def build_reward(kind: str, settings: Mapping[str, object]) -> RewardFunction:
    """The reward function of a kind.

    Args:
        kind: of `REWARDS`.
        settings: the fields of the kind's recipe config, without `kind` and `weight`.

    Raises:
        UserError: `reward.*`: a schema, library or plugin that it needs is not there.
    """
    reward = REWARDS[kind](**{key: settings[key] for key in settings if key not in _NOT_SETTINGS})
    # What it needs is looked at now: not after the model is loaded and the first answers are there.
    if isinstance(reward, JsonSchemaReward):
        _ = reward.validator
    elif isinstance(reward, PythonReward):
        _ = reward.function
    elif isinstance(reward, HttpReward):
        reward.headers()
    return reward


_NOT_SETTINGS = frozenset({"kind", "weight"})

__all__ = ["REWARDS", "Answered", "RewardFunction", "build_reward", "total_rewards"]
