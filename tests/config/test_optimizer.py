"""Learning rates of the rules: AdamW's, but where that would not do."""

from __future__ import annotations

import pytest

from config.test_auto import FACTS, recipe
from tunesmith.config.auto import resolve


@pytest.mark.parametrize(
    ("optimizer", "rate", "reason"),
    [
        ("adamw_8bit", 2e-5, "full"),
        ("muon", 2e-5, "full"),
        ("galore", 2e-5, "full"),
        ("apollo_mini", 2e-5, "full"),
        ("badam", 2e-5, "full"),
        ("lion", 2e-6, "a tenth of AdamW's"),
        ("adafactor", 2e-4, "ten times AdamW's"),
        ("sgd", 2e-2, "a thousand times AdamW's"),
    ],
)
def test_learning_rates(optimizer: str, rate: float, reason: str) -> None:
    resolved = resolve(recipe(method="full", train={"optimizer": optimizer}), FACTS)
    assert resolved.recipe.train.learning_rate == rate
    assert reason in resolved.reasons["train.learning_rate"]
