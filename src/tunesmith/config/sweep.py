"""The sweep of a recipe: which keys are searched, how, and for how long."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any, Literal, cast

from pydantic import Field, JsonValue, model_validator

from tunesmith.config.base import Auto, PositiveInt, Strict


class SpaceEntry(Strict):
    """Where the values of one key come from: a range, or a list."""

    low: int | float | None = None
    """Smallest value; two whole numbers make a range of whole numbers."""
    high: int | float | None = None
    """Largest value."""
    log: bool = False
    """Evenly over orders of magnitude, as for learning rates."""
    values: list[JsonValue] | None = None
    """A list to choose from, in place of a range; [8, 16] is short for {values: [8, 16]}."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: object) -> object:
        if isinstance(value, list):
            value = {"values": value}
        if isinstance(value, dict) and isinstance(value.get("values"), list):
            given = cast("dict[str, Any]", value)
            return {**given, "values": [_number(each) for each in given["values"]]}
        return cast("object", value)

    @model_validator(mode="after")
    def _is_one_of_both(self) -> SpaceEntry:
        if self.values is not None:
            if not self.values or self.low is not None or self.high is not None or self.log:
                raise ValueError("either `values` that are not empty, or `low` and `high`")
        elif self.low is None or self.high is None:
            raise ValueError("`low` and `high`, or `values`")
        elif not self.low < self.high:
            raise ValueError("`low` below `high`")
        elif self.log and self.low <= 0:
            raise ValueError("`low` above 0 where `log` is true")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether its range is one of whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)


class SweepConfig(Strict):
    """A search for the best values (`tunesmith sweep`); a training does not read it."""

    space: Annotated[dict[str, SpaceEntry], Field(min_length=1)]
    """Key path -> values, e.g. {train.learning_rate: {low: 1e-5, high: 1e-3, log: true}}."""
    trials: PositiveInt = 20
    """So many trainings; of a grid at most all its points."""
    metric: str = "loss"
    """What is compared: a figure of the validation, e.g. loss, accuracy, reward_accuracy."""
    direction: Literal["minimize", "maximize"] = "minimize"
    """Whether less of it is better, or more."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """How values are chosen: tree-structured Parzen estimator (arXiv 2304.11127), at random, or all
    combinations."""
    pruner: Literal["asha", "median", "none"] = "asha"
    """Which trials end early: after 1, 3, 9, ... validations those not among the best third (ASHA,
    arXiv 1810.05934), those worse than the median, or none."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Stop after so many minutes of training in all; null knows no limit."""
    parallel: Auto | PositiveInt = "auto"
    """Processes at a time; auto is one for each CUDA device, one without."""
    together: Auto | PositiveInt = "auto"
    """Trials of a process that train at once, step by step in turns, on one copy of a frozen base.

    auto is 4 where all that is trained are LoRA adapters, 1 elsewhere."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the sampler."""

    @model_validator(mode="after")
    def _grid_has_points(self) -> SweepConfig:
        ranges = [key for key, entry in self.space.items() if entry.values is None]
        if self.sampler == "grid" and ranges:
            raise ValueError(f"`values` for {ranges[0]}: a grid has no ranges")
        return self


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text (it wants 1.0e-4); in a list of values a number is meant."""
    if isinstance(value, str) and value[:1].isdigit():
        with suppress(ValueError):
            return float(value)
    return value
