"""MLflow: a server, a database, or a folder."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from tunesmith.config.load import flatten
from tunesmith.config.trackers import MlflowConfig
from tunesmith.engine.trackers.base import TrackedRun

LONGEST_VALUE = 500
"""Characters of a parameter, as the oldest servers allow."""


class MlflowTracker:
    """A run of MLflow; the recipe's keys are its parameters."""

    def __init__(self, config: MlflowConfig) -> None:
        self.config = config
        self._mlflow: Any = None

    def start(self, run: TrackedRun) -> str:
        """Begins a run, or goes on with it."""
        mlflow: Any = importlib.import_module("mlflow")
        if self.config.tracking_uri is not None:
            mlflow.set_tracking_uri(self.config.tracking_uri)
        mlflow.set_experiment(self.config.experiment)
        # MLflow remembers a thread's own run; all calls come from this one.
        found = mlflow.start_run(run_id=run.id, run_name=self.config.run or run.name)
        self._mlflow = mlflow
        if run.id is None:  # a parameter that is there already cannot change
            values = flatten(dict(run.recipe)).items()
            mlflow.log_params({key: str(value)[:LONGEST_VALUE] for key, value in values})
        return str(found.info.run_id)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Logs figures of a step."""
        self._mlflow.log_metrics(dict(figures), step=step)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Logs the result and ends the run, as killed if it was stopped before its end."""
        numbers = {
            f"result/{name}": float(value)
            for name, value in (summary or {}).items()
            if isinstance(value, int | float)
        }
        if numbers:
            self._mlflow.log_metrics(numbers)
        self._mlflow.end_run("FINISHED" if summary is not None else "KILLED")
