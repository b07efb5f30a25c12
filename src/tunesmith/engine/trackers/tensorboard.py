"""TensorBoard: event files in the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tunesmith.config.trackers import TensorBoardConfig
from tunesmith.engine.trackers.base import TrackedRun


class TensorBoardTracker:
    """Writes scalars, the recipe and the summary; each start of a run has a file of its own."""

    def __init__(self, config: TensorBoardConfig) -> None:
        self.config = config
        self._writer: Any = None

    def start(self, run: TrackedRun) -> str:
        """Opens an event file."""
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = Path(self.config.folder or run.folder / "tensorboard")
        self._writer = SummaryWriter(str(folder))
        if run.id is None:
            self._write_text("recipe", run.recipe)
        return str(folder)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes scalars, to the disk: the ledger says that they are there."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Closes the file."""
        if summary is not None:
            self._write_text("summary", summary)
        self._writer.close()

    def _write_text(self, name: str, values: Mapping[str, Any]) -> None:
        text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
        self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()))
