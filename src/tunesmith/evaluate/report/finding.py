"""What a rule of the diagnosis says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["bad", "warn", "good"]


@dataclass(frozen=True)
class Finding:
    """One thing that is seen in a run.

    Args:
        rule: its name, for programs.
        level: how bad it is.
        title: what it is.
        evidence: what it is seen by, with figures.
        advice: the next thing to try.
    """

    rule: str
    level: Level
    title: str
    evidence: str
    advice: str
