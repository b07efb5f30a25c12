"""One process of a sweep: `python -m tunesmith.sweep.worker`, with its task on standard input."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from tunesmith.config.load import recipe_with
from tunesmith.errors import Interrupted, TunesmithError
from tunesmith.sweep.run import work
from tunesmith.sweep.space import sweep_of
from tunesmith.sweep.study import Study
from tunesmith.types import Event, Json


class LogWatcher:
    """Writes trials down in the worker's log."""

    def begun(self, number: int, values: dict[str, Json]) -> None:
        """A trial begins."""
        self._say(f"trial {number}: {values}")

    def told(self, number: int, event: Event) -> None:
        """Nothing: its own events.jsonl has it."""

    def ended(self, number: int, state: str, value: float | None, why: str) -> None:
        """A trial is at its end."""
        self._say(f"trial {number}: {state} {value} {why}")

    def _say(self, text: str) -> None:
        print(text, flush=True)  # noqa: T201 - its standard output is the log


def main() -> int:
    """Works until there is nothing left, or until the process that started it is gone."""
    parent, task = os.getppid(), json.loads(sys.stdin.read())
    loaded = replace(
        recipe_with(task["recipe"], [], name=task["name"]), folder=Path(task["folder"])
    )
    study = Study(Path(task["output"]), sweep_of(loaded))
    try:
        work(
            loaded,
            study,
            LogWatcher(),
            mine=task["mine"],
            is_told_to_stop=lambda: os.getppid() != parent,
        )
    except Interrupted:
        return 0  # whoever started it has sent the signal
    except TunesmithError as error:
        print(error, flush=True)  # noqa: T201 - the last line of the log is what is shown
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
