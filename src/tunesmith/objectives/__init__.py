"""Objectives by their recipe names: what they learn from, and how they are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tunesmith.objectives.base import Objective, StepResult
from tunesmith.objectives.classify import ClassifyObjective
from tunesmith.objectives.distill import DistillObjective
from tunesmith.objectives.lm import SftObjective
from tunesmith.objectives.policy import make_policy
from tunesmith.objectives.preference import PreferenceObjective
from tunesmith.objectives.preference_losses import PAIR_KINDS
from tunesmith.objectives.rated import RatedObjective
from tunesmith.objectives.reward import RewardObjective


@dataclass(frozen=True)
class Family:
    """One name of the registry.

    Args:
        make: takes the recipe's settings, `trunk`, and `reference` if it needs one.
        kinds: the samples it learns from, as class names.
        group_size: sequences of a sample that it compares; 0 looks at tokens alone.
        needs_reference: whether it asks what the model was before training.
        needs_mismatched: whether each sample also brings another one's answer to its prompt.
    """

    make: Callable[..., Objective]
    kinds: tuple[str, ...]
    group_size: int = 0
    needs_reference: bool = False
    needs_mismatched: bool = False


PAIR_NAMES = {"dpo": "sigmoid", "dpo_norm": "sigmoid_norm"}
"""Names of the field where they are not those of the losses."""

OBJECTIVES: dict[str, Family] = {
    "sft": Family(SftObjective, ("Conversation", "Completion", "Text")),
    "pretrain": Family(SftObjective, ("Text",)),
    "reward": Family(RewardObjective, ("Preference",), group_size=2),
    "classify": Family(ClassifyObjective, ("Labeled",)),
    "distill": Family(DistillObjective, ("Conversation", "Completion", "Text")),
    **{
        {loss: name for name, loss in PAIR_NAMES.items()}.get(kind, kind): Family(
            partial(PreferenceObjective, kind),
            ("Preference",),
            group_size=2,
            needs_reference=entry.needs_reference,
        )
        for kind, entry in PAIR_KINDS.items()
    },
    "kto": Family(
        partial(RatedObjective, "kto"),
        ("Rated",),
        group_size=1,
        needs_reference=True,
        needs_mismatched=True,
    ),
    "apo_zero_unpaired": Family(
        partial(RatedObjective, "apo_zero_unpaired"),
        ("Rated",),
        group_size=1,
        needs_reference=True,
    ),
    **{
        name: Family(
            partial(make_policy, name),
            ("Conversation", "Completion"),
            needs_reference=True,
        )
        for name in ("grpo", "dr_grpo", "dapo", "gspo", "rloo", "ppo")
    },
}

__all__ = ["OBJECTIVES", "Family", "Objective", "StepResult"]
