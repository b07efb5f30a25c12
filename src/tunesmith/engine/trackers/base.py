"""What a tracker is told, and what it must be able to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class TrackedRun:
    """A run as its trackers see it.

    Args:
        folder: the run directory.
        recipe: resolved, without secrets.
        id: of the tracker's own run, to go on with; None if this is the first start.
    """

    folder: Path
    recipe: Mapping[str, Any]
    id: str | None = None

    @property
    def name(self) -> str:
        """The name of the run directory."""
        return self.folder.resolve().name


class Tracker(Protocol):
    """Takes the figures of a run. All its calls come from one thread, which is not the main one."""

    def start(self, run: TrackedRun) -> str:
        """Begins, or goes on with `run.id`; returns the id to go on with another time."""
        ...

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes figures of a step; steps never go back, and the same figures never come twice."""
        ...

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Sends what is left.

        Args:
            summary: of the run; None if it was stopped before its end.
        """
        ...
