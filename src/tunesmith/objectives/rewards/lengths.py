"""`length` and `repetition`: how much an answer says, and how often it says it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tunesmith.objectives.policy_losses import overlong_penalty
from tunesmith.objectives.rewards.base import Answered

_WORD = re.compile(r"[\u3400-\u9fff\u3040-\u30ff]|[^\W\u3400-\u9fff\u3040-\u30ff]+")


@dataclass(frozen=True)
class LengthReward:
    """A value for short answers, one for long ones, and a straight line between.

    With the defaults `at_min` 0 and `at_max` -1 it is DAPO's penalty for overlong answers, whose
    buffer is from `min_tokens` to `max_tokens` (arXiv 2503.14476 eq. 13).
    """

    min_tokens: int
    max_tokens: int
    at_min: float = 0.0
    at_max: float = -1.0

    def __call__(self, answers: Sequence[Answered]) -> list[float | None]:
        """One reward for each answer."""
        tokens_A = torch.tensor([answered.num_tokens for answered in answers])
        buffer_tokens = self.max_tokens - self.min_tokens
        share_A = -overlong_penalty(
            tokens_A, max_tokens=self.max_tokens, buffer_tokens=buffer_tokens
        )
        return [self.at_min + (self.at_max - self.at_min) * share for share in share_A.tolist()]


@dataclass(frozen=True)
class RepetitionReward:
    """Minus the share of n-grams that stood in the answer before, times `max_penalty`.

    (arXiv 2502.03373 §4.2 has the same idea for each token.) Words are compared without case; each
    Chinese or Japanese character is a word.

    Args:
        n: words, or characters, of an n-gram.
        unit: `character` counts all characters but spaces.
    """

    n: int = 3
    max_penalty: float = 1.0
    unit: Literal["word", "character"] = "word"

    def __call__(self, answers: Sequence[Answered]) -> list[float | None]:
        """One penalty, from `-max_penalty` to 0, for each answer."""
        return [self._judge(answered.answer) for answered in answers]

    def _judge(self, answer: str) -> float:
        text = answer.casefold()
        units = "".join(text.split()) if self.unit == "character" else _WORD.findall(text)
        num_grams = len(units) - self.n + 1
        if num_grams < 1:
            return 0.0
        grams = {tuple(units[place : place + self.n]) for place in range(num_grams)}
        return -self.max_penalty * (num_grams - len(grams)) / num_grams
