"""The objective of a run, with what it compares the model with."""

from __future__ import annotations

from typing import Any

from tunesmith.job import Job
from tunesmith.model.build import BuiltModel
from tunesmith.model.reference import open_reference
from tunesmith.model.teacher import load_teacher
from tunesmith.objectives import OBJECTIVES, Objective
from tunesmith.objectives.policy import ValueHead

NO_OPTIONS = {"name", "reference", "teacher", "teacher_quantize"}
"""Settings of objectives that say what they compare with, not how."""


def make_objective(job: Job, built: BuiltModel) -> tuple[Objective, list[str]]:
    """The objective of a run, and a line on what it compares with."""
    config = job.resolved.recipe.objective
    family = OBJECTIVES[config.name]
    options: dict[str, Any] = config.model_dump(exclude=NO_OPTIONS)
    options["trunk"] = built.trunk
    if job.teacher is not None:
        dtype, device = job.resolved.recipe.model.dtype, job.device.torch_device
        options["teacher"], about = load_teacher(job.teacher, dtype=dtype, device=device)
        return family.make(**options), [about]
    if config.name == "ppo":
        options["value_head"] = ValueHead(job.sizes.hidden_size).to(job.device.torch_device)
    if not family.needs_reference or getattr(config, "reference", True) is not True:
        return family.make(**options), []
    reference, about = open_reference(built.model, built.parameters)
    return family.make(**options, reference=reference), [about]
