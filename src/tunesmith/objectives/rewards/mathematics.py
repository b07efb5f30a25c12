"""`math`: whether the final answer equals the reference's, mathematically."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.objectives.rewards.base import Answered
from tunesmith.objectives.rewards.math_equal import is_same_answer
from tunesmith.objectives.rewards.math_extract import final_answer, reference_answer


@dataclass(frozen=True)
class MathReward:
    """1 for the reference's final answer, 0 for another or none; unjudged without a reference.

    Verdicts are those of Math-Verify 0.9 on 163 of 187 cases; the others are listed in
    tests/objectives/test_rewards_math.py with the reason for each.
    Not read: integrals, sums with bounds, derivatives, logic; they are compared as texts.
    """

    tolerance: float = 1e-6
    boxed_only: bool = False

    def __call__(self, answers: Sequence[Answered]) -> list[float | None]:
        """One verdict for each answer."""
        return [self._judge(answered) for answered in answers]

    def _judge(self, answered: Answered) -> float | None:
        if not answered.reference.strip():
            return None
        reference = reference_answer(answered.reference)
        answer = final_answer(answered.answer, is_boxed_only=self.boxed_only)
        if answer is None:
            return 0.0
        return float(is_same_answer(answer, reference, tolerance=self.tolerance))
