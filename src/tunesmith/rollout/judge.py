"""Judges answers by the recipe's reward functions.

Shape letters: A answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tunesmith.config.objective import ObjectiveConfig
from tunesmith.config.policy import SamplingConfig
from tunesmith.config.rewards import (
    JsonSchemaRewardConfig,
    ModelRewardConfig,
    RewardFunctionConfig,
)
from tunesmith.infer.sample import Drawn
from tunesmith.infer.score_model import ScoreModel, open_score_model
from tunesmith.objectives.rewards import Answered, RewardFunction, build_reward, total_rewards
from tunesmith.rollout.prompts import Prompt
from tunesmith.types import Reporter, Tokenizer


@dataclass(frozen=True)
class Judged:
    """What answers are worth.

    Args:
        texts: of the answers.
        reward_A: the weighted sum; NaN where no function could judge.
        columns: each function's own, by name.
    """

    texts: tuple[str, ...]
    reward_A: torch.Tensor
    columns: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Judge:
    """Reward functions with their names and weights.

    Args:
        tokenizer: of the model that answers.
        end_ids: what its chat template ends an answer with, besides the tokenizer's EOS.
        functions: the reward functions.
        names: of these.
        weights: of these.
    """

    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    functions: tuple[RewardFunction, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...]

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Drawn]]) -> Judged:
        """Judges the answers to each prompt."""
        rows = [
            Answered(
                prompt=prompt.text,
                answer=str(self.tokenizer.decode(list(drawn.ids), skip_special_tokens=True)),
                reference=prompt.reference,
                rendered=str(self.tokenizer.decode(list(drawn.ids), skip_special_tokens=False)),
                num_tokens=len(drawn.ids),
                is_complete=drawn.is_complete,
            )
            for prompt, own in zip(prompts, answers, strict=True)
            for drawn in own
        ]
        totals, columns = total_rewards(self.functions, self.weights, rows)
        return Judged(
            tuple(row.answer for row in rows),
            torch.tensor(totals, dtype=torch.float64),
            {
                name: torch.tensor(column, dtype=torch.float64)
                for name, column in zip(self.names, columns, strict=True)
            },
        )


def open_judge(
    config: ObjectiveConfig,
    tokenizer: Tokenizer,
    end_ids: tuple[int, ...],
    locate: Callable[[str], Path],
    reporter: Reporter,
) -> Judge | None:
    """The reward functions of a recipe; None if its objective has none.

    Args:
        config: the recipe's objective.
        tokenizer: of the model that answers.
        end_ids: what its chat template ends an answer with.
        locate: turns a path of the recipe into one that can be opened.
        reporter: shows the loading of reward models.

    Raises:
        UserError: something that one of them needs is not there (`reward.*`).
    """
    if not isinstance(config, SamplingConfig):
        return None
    return Judge(
        tokenizer,
        end_ids,
        tuple(_open_reward(each, locate, reporter) for each in config.rewards),
        numbered([each.kind for each in config.rewards]),
        tuple(each.weight for each in config.rewards),
    )


def _open_reward(
    config: RewardFunctionConfig, locate: Callable[[str], Path], reporter: Reporter
) -> RewardFunction:
    if isinstance(config, ModelRewardConfig):
        place = locate(config.id)
        return ModelReward(open_score_model(str(place) if place.exists() else config.id, reporter))
    settings = config.settings()
    if isinstance(config, JsonSchemaRewardConfig) and config.file is not None:
        settings["file"] = str(locate(config.file))
    return build_reward(config.kind, settings)


@dataclass(frozen=True)
class ModelReward:
    """The score of a reward model for prompt and answer, as they were rendered."""

    model: ScoreModel

    def __call__(self, answers: Sequence[Answered]) -> list[float | None]:
        """An answer that was cut has no end token, as it was sampled."""
        texts = [answered.prompt + answered.rendered for answered in answers]
        return [*self.model.score(texts, is_rendered=True)]


def numbered(kinds: Sequence[str]) -> tuple[str, ...]:
    """Names for reward functions: their kinds, those that come again with a number behind."""
    seen: Counter[str] = Counter()
    names: list[str] = []
    for kind in kinds:
        seen[kind] += 1
        names.append(kind if seen[kind] == 1 else f"{kind}{seen[kind]}")
    return tuple(names)
