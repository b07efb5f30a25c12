"""TrainState: all that survives a restart, and the only place where loop state lives."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass
class TrainState:
    """Where a run stands. Random numbers need no entry: each step seeds them from (seed, step)."""

    data_key: str
    """Content hash of the data the run was started with."""
    step: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    supervised_seen: int = 0
    loss_sum: float = 0.0
    """Sum of the step losses, for the mean train_loss of the run."""
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

    def to_json(self) -> str:
        """The state as JSON; floats keep all their bits."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> TrainState:
        """Reads what `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        return cls(**values)

    def copy(self) -> TrainState:
        """An independent copy."""
        return replace(self)
