"""What all sides of the prediction benchmark share: the rows, the clock, what came out.

Runs on the python of every side, so it imports neither tunesmith nor a peer.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Work:
    """What all sides do; a JSON file carries it to the children."""

    model: str
    """Folder of the base model."""
    adapter: str
    dtype: str
    max_new_tokens: int
    threads: int
    rows: list[dict[str, Any]]
    """prompt (rendered), ids and label of each row."""

    @classmethod
    def read(cls, folder: Path) -> Work:
        """What the parent left in the folder."""
        return cls(**json.loads((folder / "work.json").read_text(encoding="utf-8")))

    def write(self, folder: Path) -> None:
        """Leaves it for the children."""
        (folder / "work.json").write_text(json.dumps(asdict(self)), encoding="utf-8")


class Clock:
    """Seconds on the wall and of the processor, from its making on."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> tuple[float, float]:
        """Since then: wall, processor."""
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


def write_result(
    file: Path, texts: list[str], seconds: tuple[float, float], packages: tuple[str, ...]
) -> None:
    """What a side has found, for the parent."""
    wall, cpu = seconds
    versions = {name: version(name) for name in packages}
    found = {"texts": texts, "wall": wall, "cpu": cpu, "versions": versions}
    file.write_text(json.dumps(found), encoding="utf-8")
