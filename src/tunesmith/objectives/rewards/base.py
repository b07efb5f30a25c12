"""What a reward function is, and the weighted sum of several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

from tunesmith.errors import TunesmithError


@dataclass(frozen=True)
class Answered:
    """One sampled answer to be judged.

    Args:
        prompt: the rendered prompt as text.
        answer: as text, without special tokens.
        reference: the data row's own answer; empty if it has none.
        num_tokens: of the answer.
        is_complete: False for an answer that was cut at the token limit.
        rendered: with its special tokens, as it was sampled.
    """

    prompt: str
    answer: str
    reference: str
    num_tokens: int = 0
    is_complete: bool = True
    rendered: str = ""


class RewardFunction(Protocol):
    """Judges answers, one number each; None or NaN is an answer that it could not judge."""

    def __call__(self, answers: Sequence[Answered]) -> Sequence[float | None]:
        """One reward for each answer, in their order."""
        ...


def total_rewards(
    functions: Sequence[RewardFunction], weights: Sequence[float], answers: Sequence[Answered]
) -> tuple[list[float], list[list[float]]]:
    """The weighted sum for each answer, and each function's own rewards.

    What a function could not judge is NaN in its column and counts nowhere in the sum; an answer
    that none could judge has the total NaN.
    """
    columns = [
        [math.nan if reward is None else float(reward) for reward in judge(answers)]
        for judge in functions
    ]
    totals: list[float] = []
    for rewards in zip(*columns, strict=True) if columns else ():
        judged = [
            weight * reward
            for weight, reward in zip(weights, rewards, strict=True)
            if not math.isnan(reward)
        ]
        totals.append(math.fsum(judged) if judged else math.nan)
    return totals if columns else [math.nan] * len(answers), columns


def checked_rewards(
    rewards: Sequence[object],
    num_answers: int,
    error: Callable[[str], TunesmithError],
    *,
    allows_nan: bool = False,
) -> list[float | None]:
    """Rewards from outside of tunesmith, if there is one finite number or None for each answer.

    Args:
        rewards: as they came.
        num_answers: how many there have to be.
        error: makes the error of what was found.
        allows_nan: NaN means None.
    """
    if len(rewards) != num_answers:
        raise error(f"{len(rewards)} rewards for {num_answers} answers")
    checked: list[float | None] = []
    for row, reward in enumerate(rewards):
        if reward is None or (allows_nan and reward != reward):
            checked.append(None)
        elif not isinstance(reward, bool) and isinstance(reward, Real) and _is_finite(reward):
            checked.append(float(reward))
        else:
            raise error(f"{str(reward)[:60]!r} for answer {row + 1} of {num_answers}")
    return checked


def _is_finite(number: Real) -> bool:
    try:
        return math.isfinite(float(number))
    except OverflowError:
        return False
