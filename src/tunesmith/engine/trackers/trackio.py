"""trackio: on this disk (`trackio show`), or in a Space of Hugging Face."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from tunesmith.config.trackers import TrackioConfig
from tunesmith.engine.trackers.base import TrackedRun


class TrackioTracker:
    """A run of trackio, which goes by its name."""

    def __init__(self, config: TrackioConfig) -> None:
        self.config = config
        self._run: Any = None

    def start(self, run: TrackedRun) -> str:
        """Begins a run, or goes on with it."""
        trackio: Any = importlib.import_module("trackio")
        name = run.id or self.config.run or run.name
        self._run = trackio.init(
            project=self.config.project,
            name=name,
            # Without an id it is a new run: one of that name in the project is another one's.
            resume="allow" if run.id is not None else "never",
            space_id=self.config.space,
            config=dict(run.recipe),
            embed=False,
        )
        return str(self._run.name)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Logs figures of a step."""
        self._run.log(dict(figures), step=step)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Sends the rest."""
        self._run.finish()
