"""Objectives by their recipe names."""

from collections.abc import Callable

from tunesmith.objectives.base import Objective, StepResult
from tunesmith.objectives.lm import SftObjective

OBJECTIVES: dict[str, Callable[..., Objective]] = {"sft": SftObjective}

__all__ = ["OBJECTIVES", "Objective", "StepResult"]
