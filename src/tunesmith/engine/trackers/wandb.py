"""Weights & Biases."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from tunesmith.config.trackers import WandbConfig
from tunesmith.engine.trackers.base import TrackedRun
from tunesmith.io.redact import redact_tree


class WandbTracker:
    """A run of W&B, or files for `wandb sync`.

    Nothing but recipe and figures goes there: not the terminal, the command line, code or
    packages, which nobody has looked through for secrets.
    """

    def __init__(self, config: WandbConfig) -> None:
        self.config = config
        self._run: Any = None

    def start(self, run: TrackedRun) -> str:
        """Begins a run, or goes on with it."""
        wandb: Any = importlib.import_module("wandb")
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_save_requirements=False,
        )
        mode = self.config.mode or wandb.setup().settings.mode
        # In a terminal `init` would ask for a key, and wait for the answer behind the bars.
        if mode == "online" and not wandb.login(prompt=False):
            raise PermissionError("no key of Weights & Biases: `wandb login` or `mode: offline`")
        self._run = wandb.init(
            project=self.config.project,
            entity=self.config.entity,
            name=self.config.run or run.name,
            id=run.id,
            resume="allow",
            reinit="create_new",  # trials of a sweep may be in one process
            tags=self.config.tags,
            mode=self.config.mode,
            config=dict(run.recipe),
            dir=str(run.folder),
            settings=settings,
        )
        return str(self._run.id)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Logs a row of the history."""
        self._run.log(dict(figures), step=step)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Sends the rest; a run that was stopped is marked as failed until it goes on."""
        for name, value in redact_tree(dict(summary or {})).items():
            self._run.summary[f"result/{name}"] = value
        self._run.finish(exit_code=0 if summary is not None else 1)
