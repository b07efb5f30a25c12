"""TrainState: all that survives a restart, and the only place where loop state lives."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass
class TrainState:
    """Where a run stands. Random numbers need no entry: each step seeds them from (seed, step)."""

    fingerprints: dict[str, str]
    """Hashes of model, template and data files that the run was started with, by their names."""
    step: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    supervised_seen: int = 0
    loss_sum: float = 0.0
    """Sum of the losses of steps that were learned from, for the mean train_loss of the run."""
    train_seconds: float = 0.0
    """Time spent in training steps, over all restarts."""
    evaluated_step: int | None = None
    """Last step at which validation ran."""
    first_loss: float | None = None
    """Validation loss before training."""
    last_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_best: int = 0
    recent_losses: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    """(step, loss) of the last steps that were learned from, for what counts as a spike."""
    bad_steps: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    """Sample ids of the steps left out in a row, up to now."""
    bad_are_finite: bool = True
    """Whether these were only too high."""
    num_learned: int = 0
    """Steps that changed weights."""
    num_skipped: int = 0
    """Steps whose update was left out, because their numbers were bad."""
    num_empty: int = 0
    """Steps without any supervised token, which change nothing."""
    excluded: list[int] = field(default_factory=list[int])
    """Samples that are no longer trained on, since a rollback."""
    num_rollbacks: int = 0
    validation_tokens: int | None = None
    """The budget of validation since memory ran out there; None is that of training."""
    micro_batch_tokens: int | None = None
    """The budget of a micro-batch since memory ran out; None is what was planned."""

    def record_evaluation(self, loss: float) -> bool:
        """Takes a validation loss in; True if it is the best so far.

        The loss before training is remembered, but is no candidate: there is nothing to keep of it.
        """
        self.evaluated_step = self.step
        self.last_loss = loss
        if self.step == 0:
            self.first_loss = loss
            return False
        is_better = self.best_loss is None or loss < self.best_loss
        if is_better and math.isfinite(loss):
            self.best_loss, self.best_step = loss, self.step
            self.evaluations_without_best = 0
            return True
        self.evaluations_without_best += 1
        return False

    def differing(self, fingerprints: Mapping[str, str]) -> list[str]:
        """Names of what has changed since the run began."""
        names = dict.fromkeys([*self.fingerprints, *fingerprints])
        return [n for n in names if self.fingerprints.get(n) != fingerprints.get(n)]

    def to_json(self) -> str:
        """The state as JSON; floats keep all their bits."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> TrainState:
        """Reads what `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        values["recent_losses"] = [(step, loss) for step, loss in values["recent_losses"]]
        values["bad_steps"] = [tuple(ids) for ids in values["bad_steps"]]
        return cls(**values)

    def copy(self) -> TrainState:
        """An independent copy."""
        return replace(
            self,
            recent_losses=list(self.recent_losses),
            bad_steps=list(self.bad_steps),
            excluded=list(self.excluded),
        )
