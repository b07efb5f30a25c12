"""Objectives by their recipe names."""

from tunesmith.objectives.base import Objective, StepResult
from tunesmith.objectives.lm import SftObjective

OBJECTIVES: dict[str, type[Objective]] = {"sft": SftObjective}

__all__ = ["OBJECTIVES", "Objective", "StepResult"]
