"""What a tracker has got of a run: kept beside the run, so that nothing is logged twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO, cast


class Ledger:
    """A file of lines, appended to: the tracker's own id, then the last step of each kind of event.

    Not covered: what a tracker's library had taken but not sent when the process was killed.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.id: str | None = None
        self.steps: dict[str, int] = {}
        self._file: TextIO | None = None
        if file.exists():
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                self._take(line)

    def _take(self, line: str) -> None:
        try:
            entry: object = json.loads(line)
        except ValueError:  # killed in the middle of the line
            return
        if isinstance(entry, dict):
            entry = cast("dict[str, Any]", entry)
            self.id = entry.get("id", self.id)
            self.steps |= {kind: step for kind, step in entry.items() if isinstance(step, int)}

    def has(self, kind: str, step: int) -> bool:
        """Whether the tracker has this already, or something later."""
        return step <= self.steps.get(kind, -1)

    def note(self, kind: str, step: int) -> None:
        """Writes down what it has got."""
        self.steps[kind] = step
        self._append({kind: step})

    def name(self, id_: str) -> None:
        """Writes down how the tracker calls the run."""
        if id_ != self.id:
            self.id = id_
            self._append({"id": id_})

    def _append(self, entry: dict[str, Any]) -> None:
        if self._file is None:
            self.file.parent.mkdir(exist_ok=True)
            is_torn = self.file.exists() and self.file.read_bytes()[-1:] not in (b"", b"\n")
            self._file = self.file.open("a", encoding="utf-8")
            self._file.write("\n" * is_torn)
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
