"""SwanLab: its cloud, a server of one's own, or files."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from tunesmith.config.trackers import SwanlabConfig
from tunesmith.engine.trackers.base import TrackedRun


class SwanlabTracker:
    """An experiment of SwanLab.

    Hardware is recorded; the terminal, the command line, git and packages are not, which nobody
    has looked through for secrets.
    """

    def __init__(self, config: SwanlabConfig) -> None:
        self.config = config
        self._run: Any = None

    def start(self, run: TrackedRun) -> str:
        """Begins an experiment, or goes on with it."""
        swanlab: Any = importlib.import_module("swanlab")
        settings = swanlab.Settings(
            interactive=False,  # it would ask for a key, and wait for the answer behind the bars
            terminal={"proxy_type": "none"},
            probe={"runtime": False, "requirements": False, "git": False},
        )
        self._run = swanlab.init(
            project=self.config.project,
            workspace=self.config.workspace,
            name=self.config.run or run.name,
            id=run.id,
            resume="allow",
            mode=self.config.mode,
            config=dict(run.recipe),
            log_dir=str(run.folder / "swanlab"),
            settings=settings,
        )
        return str(self._run.id)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Logs figures of a step."""
        self._run.log(dict(figures), step=step)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Sends the rest."""
        self._run.finish(state="success" if summary is not None else "aborted")
