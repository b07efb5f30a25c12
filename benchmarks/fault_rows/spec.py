"""What one start of a run is told, and what came of it; the same for every tool.

Runs on the python of every side, so it imports neither tunesmith nor a peer.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GLOBAL_BATCH = 8
STEPS = 20
SAVE_EVERY = 4
KEEP = 3
RANK = 4


@dataclass(frozen=True)
class Fault:
    """What goes wrong, where.

    kind: kill_step, kill_micro, kill_file, kill_bytes, kill_rotate, int_file, limit_bytes,
    term_micro, int_micro, nan, spike, oom, planted; empty for nothing.
    """

    kind: str = ""
    step: int = 0
    """Finished steps when it happens."""
    number: int = 0
    """Files there are (kill_file, int_file), bytes a file may have (kill_bytes, limit_bytes), rows
    that still fit (oom), factor (spike); for tunesmith also which micro-batch it is."""
    text: str = ""
    """Of `planted`: a TUNESMITH_FAULT."""


@dataclass(frozen=True)
class Spec:
    """One start. Paths are relative to the folder that the process works in."""

    model: str = ""
    dropout: float = 0.0
    micro_batch: int = 4
    learning_rate: float = 0.01
    seed: int = 42
    epochs: int = 4
    log_every: int = 1
    max_length: int = 128
    is_resumed: bool = False
    has_random_collator: bool = False
    has_jit_checkpoint: bool = False
    finds_batch_size: bool = False
    pause_seconds: float = 0.0
    """So much longer all but the last micro-batch of a step take once the fault has struck."""
    sources: tuple[str, ...] = ("data.jsonl",)
    """Files, one after the other where there are several (tunesmith)."""
    fault: Fault = field(default_factory=Fault)

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return GLOBAL_BATCH // self.micro_batch

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Spec:
        """What `write` wrote."""
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "fault": Fault(**values["fault"])})


@dataclass(frozen=True)
class Outcome:
    """How a process ended."""

    code: int | None
    """Exit code, negative for a signal; None if it was still at work when the time was over."""
    log: str

    @property
    def is_finished(self) -> bool:
        """Whether it came to a good end."""
        return self.code == 0

    @property
    def end(self) -> str:
        """How it ended, in words."""
        if self.code is None:
            return "did not end in time"
        return f"killed by signal {-self.code}" if self.code < 0 else f"exit {self.code}"

    @property
    def last_line(self) -> str:
        """The last line that says something."""
        lines = [line.strip() for line in self.log.splitlines() if line.strip()]
        return lines[-1][:160] if lines else "no output"


def make_rows(count: int = 40) -> list[dict[str, Any]]:
    """Small conversations of different lengths, all different."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"question {index}" + "?" * (index % 7)},
                {"role": "assistant", "content": f"answer {index * index}" + "!" * (index % 5)},
            ]
        }
        for index in range(count)
    ]
