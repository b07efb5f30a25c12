"""The effect gauge: whether tuning has changed what a model says, and how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tunesmith.errors import EvaluationError
from tunesmith.evaluate.prediction import Prediction
from tunesmith.infer.likelihood import Likelihood

NOTHING_NATS = 1e-9
"""A divergence that is this small everywhere is no change: equal weights give 0."""


@dataclass(frozen=True, slots=True)
class Effect:
    """How far a model is from the one that it began as.

    Args:
        kl_nats: mean divergence KL(before || after) at the tokens of answers; a lower bound (see
            `infer.likelihood.divergence`).
        highest_kl_nats: at one token.
        kl_tokens: tokens that it is the mean of.
        answers_changed: share of the rows that are answered otherwise.
        num_rows: rows that both have answered.
    """

    kl_nats: float
    highest_kl_nats: float
    kl_tokens: int
    answers_changed: float
    num_rows: int

    def as_json(self) -> dict[str, Any]:
        """For evaluation.json."""
        return asdict(self)


def find_effect(
    before: Sequence[Prediction],
    after: Sequence[Prediction],
    readings: Mapping[str, Likelihood],
    target: str,
) -> Effect:
    """The effect on rows that both have answered, greedily.

    Args:
        before: the first model's answers.
        after: the second's.
        readings: of the second, beside the first.
        target: the second, as the user calls it.

    Raises:
        EvaluationError: there is none (`evaluate.no-effect`): what was loaded is what training
            began with.
    """
    old = {each.id: each.prediction for each in before}
    is_changed = [old[each.id] != each.prediction for each in after if each.id in old]
    parts = [each.kl_L for each in readings.values() if each.kl_L is not None]
    kl_N = torch.cat(parts).double() if parts else torch.zeros(0)
    highest = float(kl_N.max()) if len(kl_N) else 0.0
    if len(kl_N) and highest < NOTHING_NATS and not any(is_changed):
        raise EvaluationError(
            "evaluate.no-effect",
            target,
            found=f"the same answers and probabilities as before training, at {len(kl_N):,} tokens",
            expected="a model that training has changed",
            try_="see that its adapter is not empty and is the one that was trained; or --against "
            "none to measure it alone",
        )
    share = sum(is_changed) / len(is_changed) if is_changed else 0.0
    mean = float(kl_N.mean()) if len(kl_N) else 0.0
    return Effect(mean, highest, len(kl_N), share, len(is_changed))
