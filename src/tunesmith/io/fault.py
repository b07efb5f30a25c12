"""Faults on purpose: places in the code where a test makes something go wrong.

`TUNESMITH_FAULT=point:when:action`, several with commas. Without it a point costs one comparison.

- point: a name of POINTS, or `*`;
- when: the n-th time that this process comes by (`3`), every time (`*`), or what is known at the
  point (`step=7`, `samples=12`, `tokens>300`), joined by `&`;
- action: see ACTIONS.

`TUNESMITH_FAULT_HITS=file` writes down every point that is passed.
"""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POINTS = {
    "data.tokenize": "before a batch of rows is rendered and tokenized",
    "data.next": "before the batch of a step is made",
    "net.read": "before a piece of a download is read",
    "model.load": "before weights are read",
    "step.micro": "before a micro-batch goes forward",
    "step.backward": "before its backward",
    "step.update": "before the optimizer changes weights",
    "eval.batch": "before a batch of the validation",
    "sample.token": "before a token of sampled answers",
    "sample.judge": "before sampled answers are rewarded",
    "sample.look": "before a micro-batch of them is looked at",
    "predict.row": "before a predicted row is written",
    "save.open": "before a directory is begun",
    "save.write": "before a file is written",
    "save.fsync": "before a file is made durable",
    "save.rename": "before something finished gets its name",
    "save.rotate": "before a checkpoint that is no longer kept is removed",
    "load.read": "before a checkpoint is verified and read",
    "log.emit": "before an event is written",
}
"""Every place that can be made to fail, and when it is passed."""

ACTIONS = {
    "kill": "SIGKILL to this process",
    "term": "SIGTERM to this process",
    "int": "SIGINT to this process",
    "usr1": "SIGUSR1 to this process",
    "raise": "raise:<built-in exception>",
    "enospc": "the disk is full",
    "truncate": "truncate:<bytes> cuts the file at hand",
    "flip": "flip:<offset> turns a bit of the file at hand",
    "sleep": "sleep:<seconds>",
    "nan": "the caller's number is spoiled",
    "scale": "scale:<factor> multiplies the caller's number",
    "oom": "MemoryError",
}

RAISED: dict[str, Callable[[str], Exception]] = {
    kind.__name__: kind for kind in (RuntimeError, ValueError, OSError, ConnectionError, KeyError)
}
SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "usr1": signal.SIGUSR1,
}
CONDITION = re.compile(r"(\w+)([=>])(\d+)")

Fact = int | Callable[[], Sequence[int]]
"""A number, or what finds several of them if they are asked for."""


@dataclass(frozen=True)
class Fault:
    """One planted fault."""

    point: str
    when: str
    action: str
    argument: str

    def is_due(self, point: str, count: int, facts: Mapping[str, Fact]) -> bool:
        """Whether it happens at this passing of a point."""
        if self.point not in ("*", point):
            return False
        if self.when == "*":
            return True
        if self.when.isdecimal():
            return count == int(self.when)
        return all(_holds(part, facts) for part in self.when.split("&"))


def _holds(condition: str, facts: Mapping[str, Fact]) -> bool:
    match = CONDITION.fullmatch(condition)
    if match is None:
        raise ValueError(f"TUNESMITH_FAULT: {condition!r} is no condition")
    name, sign, number = match[1], match[2], int(match[3])
    if name == "attempt":  # of a supervised run, counted from 0
        facts = {"attempt": int(os.environ.get("TUNESMITH_ATTEMPT", "0"))}
    if name not in facts:
        return False
    fact = facts[name]
    values = [fact] if isinstance(fact, int) else fact()
    return any(value == number if sign == "=" else value > number for value in values)


class _Armed:
    """What was planted, and how often each point has been passed."""

    def __init__(self, faults: list[Fault], hits: Path | None) -> None:
        self.faults = faults
        self.hits = hits
        self.counts = Counter[str]()


def parse_faults(text: str) -> list[Fault]:
    """Reads the value of TUNESMITH_FAULT.

    Raises:
        ValueError: a part of it is not `point:when:action[:argument]` with known names.
    """
    faults: list[Fault] = []
    for part in filter(None, text.split(",")):
        point, when, action, argument = [*part.split(":", 3), "", "", ""][:4]
        if (point != "*" and point not in POINTS) or not when or action not in ACTIONS:
            raise ValueError(f"TUNESMITH_FAULT: {part!r} is not point:when:action")
        faults.append(Fault(point, when, action, argument))
    return faults


def arm(environment: Mapping[str, str] = os.environ) -> None:
    """Reads the environment; done once at import, and again by tests that fork."""
    global _armed
    text, hits = environment.get("TUNESMITH_FAULT", ""), environment.get("TUNESMITH_FAULT_HITS")
    is_armed = bool(text or hits)
    _armed = _Armed(parse_faults(text), Path(hits) if hits else None) if is_armed else None


_armed: _Armed | None = None
arm()


def fault(point: str, path: Path | None = None, **facts: Fact) -> float:
    """A place where something may go wrong.

    Args:
        point: its name in POINTS.
        path: the file at hand, for `truncate` and `flip`.
        facts: numbers that a fault's `when` can ask for.

    Returns:
        what the caller's number is to be multiplied by.
    """
    if _armed is None:
        return 1.0
    if point not in POINTS:
        raise ValueError(f"{point!r} is not in POINTS")
    _armed.counts[point] += 1
    if _armed.hits is not None:
        with _armed.hits.open("a", encoding="ascii") as file:
            file.write(f"{point}\n")
    due = [each for each in _armed.faults if each.is_due(point, _armed.counts[point], facts)]
    return math.prod([_act(each, point, path) for each in due])


def _act(fault: Fault, point: str, path: Path | None) -> float:
    action, argument = fault.action, fault.argument
    if action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[action])
    elif action == "raise":
        raise RAISED[argument](f"planted at {point}")
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path or point))
    elif action == "oom":
        raise MemoryError(f"planted at {point}")
    elif action == "sleep":
        time.sleep(float(argument))
    elif action in ("truncate", "flip") and path is not None:
        _spoil_file(path, action, int(argument or 0))
    elif action == "nan":
        return math.nan
    elif action == "scale":
        return float(argument)
    return 1.0


def _spoil_file(path: Path, action: str, place: int) -> None:
    with path.open("r+b") as file:
        if action == "truncate":
            file.truncate(place)
            return
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))
