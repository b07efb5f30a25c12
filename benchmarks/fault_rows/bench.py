"""One tool under test: its folders, its undisturbed run, and how two runs compare."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fault_rows.server import Running
from fault_rows.spec import Fault, Outcome, Spec, make_rows
from fault_rows.tools import Tool, Tunesmith, largest_difference

PASS, HALF, FAIL, NONE, LATER = "pass", "half", "fail", "n/a", "not yet"

SCORES = {PASS: 1.0, HALF: 0.5, FAIL: 0.0}

BROKEN_AT = 14
"""Where runs are killed that others go on from: checkpoints 4, 8 and 12 are there then."""


@dataclass(frozen=True)
class Verdict:
    """What a row gave for a tool."""

    score: str
    evidence: str


def together(parts: list[Verdict]) -> Verdict:
    """Several parts of a row: all, none, or half."""
    scores = {part.score for part in parts}
    evidence = "; ".join(part.evidence for part in parts)
    if LATER in scores:
        return Verdict(LATER, evidence)
    return Verdict(scores.pop() if len(scores) == 1 else HALF, evidence)


@dataclass
class Bench:
    """Runs of one tool.

    Args:
        tool: who trains.
        root: an empty folder for all runs.
        models: folder of the tiny model, and of one whose loss can fall far (`able`).
    """

    tool: Tool
    root: Path
    models: Path
    _made: dict[str, Path] = field(default_factory=dict)

    @property
    def is_own(self) -> bool:
        """Whether it is tunesmith."""
        return isinstance(self.tool, Tunesmith)

    # Folders

    def fresh(self, rows: list[Any] | None = None) -> Path:
        """A new folder with data."""
        folder = self.root / f"run-{len(list(self.root.iterdir())):03}"
        folder.mkdir()
        self.tool.write_data(folder, make_rows() if rows is None else rows)
        return folder

    def copy(self, other: Path) -> Path:
        """A copy of a folder, to go on in."""
        folder = self.root / f"run-{len(list(self.root.iterdir())):03}"
        shutil.copytree(other, folder, copy_function=shutil.copy2)
        return folder

    def spec(self, **changes: Any) -> Spec:
        """What a start is told."""
        return replace(Spec(model=str(self.models / "model")), **changes)

    # Runs

    def run(self, folder: Path, spec: Spec) -> Outcome:
        """One start, waited for."""
        if self.is_own and spec.fault.kind in OUTSIDE:
            return self._run_from_outside(folder, spec)
        return self.tool.server.start(folder, spec).wait()

    def resume(self, folder: Path, **changes: Any) -> Outcome:
        """The same command again, without a fault."""
        return self.run(folder, self.spec(is_resumed=True, **changes))

    def oracle(self, **changes: Any) -> Path:
        """The undisturbed run with these settings; done once.

        Raises:
            RuntimeError: it does not even finish undisturbed.
        """
        key = f"oracle {changes}"
        if key not in self._made:
            folder = self.fresh()
            outcome = self.run(folder, self.spec(**changes))
            if not outcome.is_finished or not self.tool.final_weights(folder):
                raise RuntimeError(f"{self.tool.name}, undisturbed: {outcome.log[-3000:]}")
            self._made[key] = folder
        return self._made[key]

    def broken(self) -> Path:
        """A copy of a run that was killed at step BROKEN_AT."""
        if "broken" not in self._made:
            folder = self.fresh()
            self.run(folder, self.spec(fault=Fault("kill_step", BROKEN_AT)))
            self._made["broken"] = folder
        return self.copy(self._made["broken"])

    def log(self, folder: Path) -> str:
        """What the last start in a folder printed."""
        return (folder / "log.txt").read_text(encoding="utf-8", errors="replace")

    # Comparison

    def difference(self, folder: Path, other: Path) -> float:
        """Largest difference of the final weights."""
        final = self.tool.final_weights
        return largest_difference(final(folder), final(other))

    def judge_resume(self, folder: Path, oracle: Path, outcome: Outcome) -> Verdict:
        """Whether a resumed run came to the end of the undisturbed one, to the bit."""
        if not outcome.is_finished:
            return Verdict(FAIL, f"resume: {outcome.end}, {reason(outcome)}")
        difference = self.difference(folder, oracle)
        if difference == 0:
            return Verdict(PASS, "final weights equal to the bit after resume")
        return Verdict(FAIL, f"final weights differ by {difference:.2g} after resume")

    def new_lines(self, outcome: Outcome, *, other: Path | None = None) -> list[str]:
        """What was printed and not by the undisturbed run, numbers aside."""
        known = {shape_of(line) for line in self.log(other or self.oracle()).splitlines()}
        return [line for line in outcome.log.splitlines() if shape_of(line) not in known]

    # Faults into tunesmith that have no point in it

    def _run_from_outside(self, folder: Path, spec: Spec) -> Outcome:
        """Acts on the process once it has done so many steps."""
        running = self.tool.server.start(folder, spec)
        wait_for_step(self.tool, running, folder, spec.fault.step)
        OUTSIDE[spec.fault.kind](running.pid, spec.fault.number)
        return running.wait()

    def hits(self, folder: Path) -> list[str]:
        """The points that a start of tunesmith passed."""
        path = folder / "hits.txt"
        return path.read_text(encoding="ascii").split() if path.exists() else []

    def second_micro(self, step: int) -> int:
        """Which micro-batch of a run is the second one of a step, for tunesmith; else 0."""
        if not self.is_own:
            return 0
        updates = micros = 0
        for point in self.hits(self.oracle()):
            updates += point == "step.update"
            micros += point == "step.backward"
            if updates == step and point == "step.backward":
                return micros + 1
        return 0


def limit_files(process: int, size: int) -> None:
    """No file of the process may get longer."""
    _, hard = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (size, hard))


OUTSIDE: dict[str, Callable[[int, int], object]] = {"limit_bytes": limit_files}


def wait_for_step(tool: Tool, running: Running, folder: Path, step: int) -> bool:
    """Waits until so many steps are done; False if the process ends before."""
    deadline = time.monotonic() + 60
    while running.poll() is None and time.monotonic() < deadline:
        if max(tool.losses(folder), default=0) >= step:
            return True
        time.sleep(0.002)
    return False


def send(process: int, number: int) -> None:
    """A signal; the process may be gone."""
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return


def reason(outcome: Outcome) -> str:
    """The line of an output that says why: the error's, without the traceback or the advice."""
    lines = [line.strip() for line in outcome.log.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("try: ")]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    found = errors[-1] if errors else (lines[-1] if lines else "no output")
    return shorten(found)


def shorten(text: str, length: int = 150) -> str:
    """A text in so many characters, without the folders of runs."""
    text = re.sub(r"/\S*/run-\d+/", "", text.strip())
    return text if len(text) <= length else text[: length - 3] + "..."


def shape_of(line: str) -> str:
    """A line without what changes from run to run."""
    return re.sub(r"[\d.:%eE|\-]+", "#", line).strip()


def describe(differences: dict[Any, float]) -> str:
    """Differences by place, in words."""
    return ", ".join(f"{place}: {value:.2g}" for place, value in differences.items())


STOP, GO = signal.SIGSTOP, signal.SIGCONT
